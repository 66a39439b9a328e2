"""Estimate for hardware that is not here: memory, step time and hours of a recipe on named GPUs, from config.json alone."""
