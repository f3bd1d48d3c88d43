"""Speed, measured: each module prints the physical ceiling first and one line of JSON last."""
