"""From models and test rows to a report: requests, scores, intervals, tables and plots."""
