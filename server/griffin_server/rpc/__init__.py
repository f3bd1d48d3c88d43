"""The public service: its servicer, and its messages to and from the core."""
