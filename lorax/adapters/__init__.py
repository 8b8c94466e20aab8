"""LoRA: which layers it adapts and what it computes."""
