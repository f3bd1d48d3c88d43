"""The engine: one thread that owns the model and all sessions."""
