"""Evaluation: models and test rows to scores, intervals and a report with tables and plots."""
