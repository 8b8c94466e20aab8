"""Conversations to text by a chat template, and to tokens with a loss mask."""
