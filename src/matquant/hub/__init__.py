"""Checkpoints on the Hugging Face hub: push them, and pull as many bits as are needed."""
