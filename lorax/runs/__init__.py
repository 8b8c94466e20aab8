"""One run: a config in, verified exports out."""
