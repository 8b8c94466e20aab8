"""What is learned: supervised fine-tuning."""
