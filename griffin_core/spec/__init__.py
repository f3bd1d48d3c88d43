"""The shape of a model, and the names that settings and requests choose from.

Imports no engine and no device code."""
