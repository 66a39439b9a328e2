"""The report: its schema, writing, plots, comparison and the quality gate."""
