"""The KV cache of sessions, and the budget of bytes for caches and slim views."""
