"""Formats of stored frozen matrices, one file each."""
