"""Families of decoders, and their config.json field by field."""
