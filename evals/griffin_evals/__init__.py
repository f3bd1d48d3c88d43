"""Quality, measured: how far generation on experts strays from the dense model."""
