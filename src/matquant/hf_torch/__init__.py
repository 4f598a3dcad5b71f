"""Hugging Face models in torch."""
