"""A decode server's prefill servers: choosing among them, calling one, and noticing failures."""
