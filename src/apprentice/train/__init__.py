"""The training loop on DeepSpeed under Ray Train, from packed rows to an exported model."""
