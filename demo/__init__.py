"""`make demo`: completes one prompt at three densities, with a prefill and a decode server."""
