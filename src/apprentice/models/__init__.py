"""Base and tuned weights to a model that can be trained, scored or served."""
