"""Attention of a model: which implementation runs where, and those that keep the examples of a packed row apart."""
