"""Adapters on Flax NNX models: applied, merged and taken off."""
