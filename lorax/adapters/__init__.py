"""LoRA: its methods, the layers that it adapts, its settings matched to a model."""
