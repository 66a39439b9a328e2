"""Rounds of replies for on-policy training (GRPO)."""
