"""The expert-selection stage: activations of the prompt in, expert sets out.

It sees activations [T, F] and returns neuron indices; it knows no model family.
"""
