"""From logits to tokens: what a request asks for, the draw for a whole batch, log-probabilities,
and the end of a completion."""
