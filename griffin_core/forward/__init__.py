"""Runs of the model: prompts and decode steps."""
