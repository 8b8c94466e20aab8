"""The trainer and its one compiled step."""
