"""Losses and their registry: supervised, preference, on-policy."""
