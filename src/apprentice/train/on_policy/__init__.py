"""On-policy training (GRPO): rounds of replies that the model writes and learns from."""
