"""Measures, once for each model, which way of choosing experts loses least (``griffin
calibrate``)."""
