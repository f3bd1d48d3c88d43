"""Measures open questions of GRIFFIN (arXiv 2404.01365) on small models: `make study`.

Each part is a module with a function ``measure(lab) -> figures``; ``page`` and ``pictures`` turn
the figures of all parts into docs/STUDY.md.
"""
