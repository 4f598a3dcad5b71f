"""Evaluation of a checkpoint at each width."""
