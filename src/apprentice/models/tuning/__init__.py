"""Parameter-efficient tuning methods: LoRA, bottleneck adapters, prefix and prompt tuning."""
