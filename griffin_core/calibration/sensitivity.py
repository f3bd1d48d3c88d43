"""How much a model's output depends on each FF neuron, and how strongly each one fires.

The sensitivity of a neuron is the mean square of the gradient of the log-likelihood with respect to
its activation: the diagonal of the Fisher information (arXiv 1801.05787). The likelihood is of
tokens that the model itself draws after each token of a text, so the text needs no labels. One
backward pass a window gives the gradients of all neurons at all of its tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from griffin_core.hf_blocks import find_blocks, sizes


@dataclass(frozen=True, kw_only=True)
class NeuronMeans:
    """Means over the tokens of all windows.

    Args:
        sensitivity: [L, F] float32, of the squared gradients.
        mean_squares: [L, F] float32, of Z_tf².
        means: [L, F] float32, of Z_tf.
    """

    sensitivity: Tensor
    mean_squares: Tensor
    means: Tensor


def neuron_means(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> NeuronMeans:
    """Runs each window forward and backward.

    Args:
        model: a model of transformers whose weights need no gradients.
        windows: token ids.
        seed: of the tokens that the model draws.
        done: called after each window.

    Raises:
        UnknownFamily: its FF blocks cannot be found.
    """
    blocks = find_blocks(model)
    neurons = (sizes(blocks[0].down) or (0, 0))[0]
    sums = torch.zeros((3, len(blocks), neurons), dtype=torch.float32)
    tokens = 0
    generator = torch.Generator().manual_seed(seed)
    for window in windows:
        ids = torch.tensor([list(window)], device=model.device)
        with _kept_activations([block.down for block in blocks]) as kept, torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(dim=1).cpu(), 1, generator=generator)
            chosen = logits.log_softmax(dim=1).gather(1, drawn.to(logits.device))
            gradients = torch.autograd.grad(chosen.sum(), kept)
        for layer, (z, gradient) in enumerate(zip(kept, gradients, strict=True)):
            values = z.detach().float().flatten(0, -2)
            sums[0, layer] += gradient.float().flatten(0, -2).square().sum(dim=0).cpu()
            sums[1, layer] += values.square().sum(dim=0).cpu()
            sums[2, layer] += values.sum(dim=0).cpu()
        tokens += len(window)
        done()
    sensitivity, mean_squares, means = sums / tokens
    return NeuronMeans(sensitivity=sensitivity, mean_squares=mean_squares, means=means)


@contextlib.contextmanager
def _kept_activations(downs: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Keeps the input of each down projection, and lets gradients reach it."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        kept.append(z)
        return (z, *args[1:])

    with contextlib.ExitStack() as undo:
        for down in downs:
            undo.callback(down.register_forward_pre_hook(keep).remove)
        yield kept
