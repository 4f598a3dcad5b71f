"""Use nested checkpoints inside other libraries."""
