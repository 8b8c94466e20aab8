"""Adapters on Flax Linen models: found by tracing, applied by interception, merged."""
