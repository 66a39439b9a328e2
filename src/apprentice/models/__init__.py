"""Loading, tuning and merging of models: from weights on disk to a model that can be trained, scored or served."""
