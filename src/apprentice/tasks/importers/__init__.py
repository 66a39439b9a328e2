"""Importers of other formats: PromptSource, Natural Instructions, conversations, preferences, prompts, finished instructions."""
