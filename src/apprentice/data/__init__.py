"""From datasets to packed rows. Knows tasks and tokenizers; knows nothing of models."""
