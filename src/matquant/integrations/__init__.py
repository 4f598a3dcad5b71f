"""Nested checkpoints inside other libraries."""
