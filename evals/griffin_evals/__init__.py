"""Measures quality: how much pruned generation differs from the dense model."""
