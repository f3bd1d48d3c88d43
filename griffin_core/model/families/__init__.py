"""From the fields of a config.json to a ModelSpec."""
