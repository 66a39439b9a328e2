"""Engines behind one protocol: ours on PyTorch, and vLLM."""
