"""Which neurons are experts, on any model of transformers: the method written out in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from griffin_core.errors import InvalidRequest, UnknownFamily
from griffin_core.experts.correction_fit import FITTED_TOKENS
from griffin_core.experts.selection import Selection, select_experts
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.hf_blocks import Block, sizes
from griffin_core.spec.calibration import PRIOR_TOKENS, Calibration


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a layer's FF did with one prompt of T tokens, in float64 on the CPU.

    Args:
        tokens: T.
        s: [F], the paper's statistic.
        squares: [F], the sum of each neuron's squared activation.
        values: [F], the sum of each neuron's activation.
        x: [n, D], the input at the last tokens.
        z: [n, F], the activations there.
    """

    tokens: int
    s: Tensor
    squares: Tensor
    values: Tensor
    x: Tensor
    z: Tensor

    @staticmethod
    def of(x: Tensor, z: Tensor, s: Tensor, *, fits: bool) -> Seen:
        """Notes the input [T, D] and the activations [T, F] of all tokens.

        Args:
            fits: whether to keep the last rows, which a residual is fitted to.
        """
        x, z = x.double().cpu(), z.double().cpu()
        tail = slice(max(0, len(z) - FITTED_TOKENS) if fits else len(z), None)
        return Seen(
            tokens=len(z),
            s=s.cpu(),
            squares=z.square().sum(dim=0),
            values=z.sum(dim=0),
            x=x[tail].clone(),
            z=z[tail].clone(),
        )


@torch.no_grad()
def statistics(
    model: PreTrainedModel, blocks: Sequence[Block], prompts: Sequence[Tensor], *, fits: bool
) -> list[list[Seen]]:
    """Runs each prompt by itself. Returns what each layer did with each of them."""
    seen: list[list[Seen]] = [[] for _ in blocks]
    inputs: dict[int, Tensor] = {}

    def note(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer] = args[0].flatten(0, -2)

    def collect(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        z = args[0].flatten(0, -2)
        seen[layer].append(Seen.of(inputs.pop(layer), z, _s(z), fits=fits))

    with contextlib.ExitStack() as undo:
        for layer, block in enumerate(blocks):
            undo.callback(block.inner[0].register_forward_pre_hook(partial(note, layer)).remove)
            undo.callback(block.down.register_forward_pre_hook(partial(collect, layer)).remove)
        for ids in prompts:
            model.base_model(input_ids=ids[None], use_cache=False)
    lengths = [len(ids) for ids in prompts]
    for block, runs in zip(blocks, seen, strict=True):
        tokens = [each.tokens for each in runs]
        if tokens != lengths:  # the block is shared between layers, or was skipped
            raise UnknownFamily(
                f"{block.name}: its down projection ran on {tokens[:8]} tokens; allowed: each "
                f"token of the prompts once, {lengths[:8]}"
            )
        if not all(each.s.isfinite().all() for each in runs):
            given = f"NaN or infinite activations in {block.name}"
            raise InvalidRequest("model", given, "weights and a data type that suit the prompt")
    return seen


def _s(z: Tensor) -> Tensor:
    """Computes the statistic s [F] of activations [T, F] (section 4.2)."""
    z = z.to(_exact(z.device))
    norms = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    unit = z / norms.where(norms > 0, 1.0)  # a row of zeros stays zero
    s: Tensor = torch.linalg.vector_norm(unit, dim=0)
    return s


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def batch_score(s: Tensor) -> Tensor:
    """Computes Σ_i s_i/√S_i [L, F] from s [N, L, F]. Each token that counted has added 1 to Σ_f
    s_f², so this sum is S_i."""
    tokens = s.square().sum(dim=2, keepdim=True).clamp(min=1)
    return (s / tokens.sqrt()).sum(dim=0)


def choose(
    score: Tensor,
    blocks: Sequence[Block],
    selection: Selection,
    seen: Sequence[Sequence[Seen]],
    calibration: Calibration | None,
) -> SlimSpec:
    """Chooses the experts of each layer by its score [L, F]. Ties go to the lower index."""
    match selection.policy:
        case "topk":
            strength = score
        case "sensitive" | "topk_budgets":
            assert calibration is not None
            return calibrated_choice(score, selection, seen, calibration)
        case "magnitude":
            strength = torch.stack([_magnitude(block) for block in blocks])
        case _:
            return select_experts(score.square(), selection, magnitude=lambda: score)
    order = strength.sort(dim=1, descending=True, stable=True).indices
    k = selection.count(score.shape[1])
    layers = [row[:k].sort().values.int() for row in order]
    return SlimSpec.of_layers(score.shape[1], layers)


def _magnitude(block: Block) -> Tensor:
    """Returns the l2 norm of each neuron's row of W_1, or the product of the norms for W_gate and
    W_up, [F]."""
    norms = []
    for linear in block.inner:
        weight: Tensor = linear.weight.detach()  # type: ignore[operator]
        rows = weight.t() if isinstance(linear, Conv1D) else weight
        if not rows.is_floating_point() or tuple(rows.shape[::-1]) != sizes(linear):
            given = f"magnitude, with quantized weights in {block.name}"
            raise InvalidRequest("policy", given, "another policy")
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=_exact(rows.device)))
    intermediate_size, _ = sizes(block.down) or (0, 0)
    return torch.cat(norms).view(-1, intermediate_size).prod(dim=0).cpu()


def calibrated_choice(
    score: Tensor,
    selection: Selection,
    seen: Sequence[Sequence[Seen]],
    calibration: Calibration,
) -> SlimSpec:
    """Chooses the experts of the policies that read a calibration.

    Args:
        score: [L, F], by which ``topk_budgets`` ranks within a layer.
        seen: for each layer, of each prompt.
    """
    layers, neurons = score.shape
    sensitivity, prior = (
        each.double().cpu() for each in (calibration.sensitivity, calibration.mean_squares)
    )
    tokens = sum(each.tokens for each in seen[0]) + PRIOR_TOKENS
    squares = torch.stack([torch.stack([each.squares for each in own]).sum(dim=0) for own in seen])
    mean = (squares + PRIOR_TOKENS * prior) / tokens
    sensitive = selection.policy == "sensitive"
    importance = sensitivity * (mean if sensitive else prior)
    k = selection.count(neurons)
    least = max(1, -(-k // 2))
    ranked = [[(float(v), n) for n, v in enumerate(row)] for row in importance]
    chosen: list[set[int]] = []
    rest: list[tuple[float, int, int]] = []
    for layer, row in enumerate(ranked):
        order = sorted(row, key=lambda each: (-each[0], each[1]))
        chosen.append({neuron for _, neuron in order[:least]})
        rest += [(-value, layer, neuron) for value, neuron in order[least:]]
    for _, layer, neuron in sorted(rest)[: layers * (k - least)]:
        chosen[layer].add(neuron)
    if not sensitive:
        by_rank = score.sort(dim=1, descending=True, stable=True).indices
        chosen = [set(row[: len(own)].tolist()) for row, own in zip(by_rank, chosen, strict=True)]
    return SlimSpec.of_layers(
        neurons, [torch.tensor(sorted(own), dtype=torch.int32) for own in chosen]
    )
