"""Runners: one pass of a model over the requests that run, for causal models, encoder-decoders and those that cannot be batched."""
