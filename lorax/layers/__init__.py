"""Layers that decoders are built of: linear, attention, rotary positions, norm, MLP."""
