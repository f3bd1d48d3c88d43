"""Running FF blocks on experts. Every form is tested against ``masked``."""
