"""Measurements of quality: how far pruned generation differs from the dense model."""
