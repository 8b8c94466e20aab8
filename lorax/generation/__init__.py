"""Generation: sampling with a key-value cache, answers to held-out rows."""
