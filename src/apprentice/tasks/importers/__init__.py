"""Tasks from other projects' files: PromptSource, Natural Instructions, conversations, preferences."""
