"""Offline batches: how ``LLM`` runs many prompts through an engine."""
