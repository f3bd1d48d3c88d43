"""`make demo`: an article summarised at three densities, by a prefill and a decode server."""
