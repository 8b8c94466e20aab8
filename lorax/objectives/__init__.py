"""Objectives: supervised fine-tuning."""
