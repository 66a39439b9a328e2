"""Faster layers of a model in training: fused kernels, and compilation."""
