"""Statistics: metrics, intervals, tests and summaries. Pure functions of predictions."""
