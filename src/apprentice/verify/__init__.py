"""Checks of a server or a model folder against a prompt contract: the same prompts, and the same ends of replies."""
