"""Rows of any format → chat template → tokens and loss mask → packed batches."""
