"""Reading and writing Hugging Face's and PEFT's files, verified."""
