"""The handoff: what a prefill server sends to a decode server, and the transports of its KV."""
