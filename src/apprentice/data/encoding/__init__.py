"""Encoding of rendered examples as token ids: prompt formats, the prompt contract, tokenization and truncation."""
