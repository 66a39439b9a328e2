"""Inference engines behind one protocol: our own on PyTorch and transformers, and vLLM."""
