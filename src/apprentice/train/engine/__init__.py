"""DeepSpeed's engine, its configuration, and collectives."""
