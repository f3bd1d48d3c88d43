"""Who calls, what they may, and how connections are encrypted."""
