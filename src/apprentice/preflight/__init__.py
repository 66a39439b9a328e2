"""Checks of everything that can be known before hardware is reserved."""
