"""Base models without PyTorch: fetching, architecture facts from config.json, tokenizers and chat templates, safety checks."""
