"""Our own inference engine on PyTorch: continuous batching, KV cache, sampling, choice scoring, adapters."""
