"""Decoders, and config.json field by field."""
