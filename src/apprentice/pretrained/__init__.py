"""What is known of a base model without PyTorch: where it comes from, its architecture, its tokenizer."""
