"""One decoder definition for every family: spec, weights, attention, feedforward, tokenizer."""
