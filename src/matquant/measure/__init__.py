"""Evaluation: how good a checkpoint is at each width."""
