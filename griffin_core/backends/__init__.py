"""The operations that run a model, with one package for each kind of device."""
