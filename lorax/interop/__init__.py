"""Hugging Face and PEFT files, both ways, verified."""
