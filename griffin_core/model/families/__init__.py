"""The model families: how each one's config.json becomes a ModelSpec, and its tensors weights."""
