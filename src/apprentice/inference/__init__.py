"""Inference engine on PyTorch: continuous batching, KV cache, sampling, choice scoring, LoRA adapters."""
