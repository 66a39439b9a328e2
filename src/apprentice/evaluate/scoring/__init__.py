"""Scoring: answers of a model or an endpoint to questions, their cache, ranking, judge and majority baseline."""
