"""Metrics, intervals and summaries. Pure functions of scores."""
