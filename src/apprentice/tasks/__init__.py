"""What a task is, and the library of tasks. Text only: no tokenizer, no model, no Ray."""
