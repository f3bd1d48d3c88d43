"""From logits to tokens: sampling parameters, the sampler of a whole batch, log-probabilities, and
stopping."""
