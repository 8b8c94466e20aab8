"""Exchange with Hugging Face: checkpoints and adapters."""
