"""Answers of a model or an endpoint to questions, remembered and scored."""
