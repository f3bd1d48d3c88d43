"""Benchmarks of speed: each module prints the physical ceiling first and one line of JSON last."""

import griffin_core  # noqa: F401  # before torch, so that OpenMP threads wait as in a server
