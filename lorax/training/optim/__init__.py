"""Optimizer and learning rates."""
