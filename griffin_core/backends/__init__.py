"""What runs the model: one package for each kind of device."""
