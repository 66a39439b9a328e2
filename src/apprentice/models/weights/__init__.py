"""Weights of a base model, read from its safetensors files in ranges, so that each process holds only its share."""
