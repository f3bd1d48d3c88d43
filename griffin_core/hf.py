"""GRIFFIN (arXiv 2404.01365) on any causal language model of transformers, by hooks.

This is the plain form of the method, and the reference that the engine is tested against. It shares
only the seeded random draws of some policies with the engine. No neuron is removed: the activations
of neurons that are not experts are set to zero before the down projection, so nothing gets faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from griffin_core.errors import InvalidRequest
from griffin_core.experts.correction import NO_CORRECTION, CorrectionParams, correction_params
from griffin_core.experts.policies import POLICIES, PolicyName
from griffin_core.experts.selection import Selection
from griffin_core.experts.slim_spec import SlimSpec
from griffin_core.hf_blocks import find_blocks
from griffin_core.hf_correction import AddCorrection, fit_layer, prior_means, rows_of_down
from griffin_core.hf_experts import batch_score, choose, statistics
from griffin_core.spec.calibration import Calibration
from griffin_core.spec.choices import CorrectionKind

_PRUNED: WeakSet[nn.Module] = WeakSet()
"""The down projections whose input a ``sparsify`` is changing now."""


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """The result of ``sparsify``.

    Args:
        s: [N, L, F], each prompt's statistic: the l2 norm over its tokens of the activations, each
            token's row scaled to unit l2 norm. On the CPU.
        experts: the experts that every completion runs on.
    """

    s: Tensor
    experts: SlimSpec

    @property
    def norm_mass(self) -> tuple[tuple[float, ...], ...]:
        """Returns for each prompt, and for each layer, the share of Σ s² that the experts hold."""
        return tuple(self.experts.norm_mass(s.square()) for s in self.s)


@contextlib.contextmanager
def sparsify(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    density: float,
    policy: PolicyName = "topk",
    seed: int = 0,
    attention_mask: Tensor | None = None,
    correction: CorrectionKind = "none",
    correction_rank: int | None = None,
    calibration: Calibration | None = None,
) -> Iterator[Sparsified]:
    """Prunes a model's feedforward (FF) blocks by the activations of a prompt, for this prompt's
    completion::

        inputs = tokenizer("The city council met on Tuesday", return_tensors="pt")
        with griffin_core.sparsify(model, inputs.input_ids, density=0.5):
            model.generate(**inputs, max_new_tokens=64)

    On entry, the prompt runs once through the model, and the experts are chosen. Inside, every
    token of the prompt still runs on all neurons, and every later token runs on the experts alone,
    however the model is called: by ``generate`` with or without a cache, in chunks, with
    beams or several sequences for each prompt, or directly with prompt and continuation to score.
    The prompt is told apart from its completion by its ids, counted from the first that is not
    padding.

    Several prompts share one expert set, chosen by Σ_i s_i/√S_i over their statistics s_i and
    numbers of tokens S_i (section 4.3). Tokens whose activations are all zero count in neither.

    Compiled code does not run hooks that are added later, so ``torch.compile`` has no effect inside
    the block, for any model.

    Args:
        model: a transformers model. Its FF blocks are found by their structure: each layer must
            have one block of two or three linear layers around an activation. Gate and up may be
            one linear layer.
        input_ids: the prompts, [N, P] or [P] integers.
        density: the fraction of FF neurons to keep, in (0, 1].
        policy: how the experts are chosen, see ``griffin_core.experts.selection``.
        seed: for policies that draw at random, in [0, 2**64).
        attention_mask: [N, P], 0 for padding, on whichever side; None if there is none.
        correction: what is added to the output of the experts: "none", as in the paper; "bias", the
            mean output of the other neurons; or "residual", a linear map of the FF's input as well.
            Prompts of fewer than 48 tokens get none, unless the policy is "sensitive"; several
            prompts, or fewer than 128 tokens, get a bias.
        correction_rank: of a residual, in [1, 256]; None for 64.
        calibration: of the model, for the policies "sensitive" and "topk_budgets".

    Raises:
        UnknownFamily: the model has another structure, such as a mixture of experts.
        InvalidRequest: an argument is out of range, or the model is in training mode or inside
            another ``sparsify``. Inside the block the model raises it too, if it is called with
            other prompts than these, or without their ids.
    """
    params = correction_params(NO_CORRECTION, correction, correction_rank)
    selection = _selection(density, policy, seed, params)
    selection.check(calibration)
    blocks = find_blocks(model)
    prompts, layout = _prompts(model, input_ids, attention_mask)
    if any(block.down in _PRUNED for block in blocks):
        raise InvalidRequest("model", "one inside another sparsify", "one sparsify at a time")
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        fits = params.kind == "residual" and len(prompts) == 1
        seen = statistics(model, blocks, prompts, fits=fits)
        s = torch.stack([torch.stack([each.s for each in own]) for own in seen], dim=1)
        slim = choose(batch_score(s), blocks, selection, seen, calibration)
        rows = _Rows(model, prompts, layout)
        for hook in (
            model.register_forward_pre_hook(rows.tell, with_kwargs=True),
            model.register_forward_hook(rows.forget, always_call=True),
        ):
            undo.callback(hook.remove)
        for block, kept in zip(blocks, slim.layers, strict=True):
            hook = block.down.register_forward_pre_hook(_Prune(rows, kept, slim.intermediate_size))
            undo.callback(hook.remove)
            undo.callback(_PRUNED.discard, block.down)
            _PRUNED.add(block.down)
        for layer, (block, kept) in enumerate(zip(blocks, slim.layers, strict=True)):
            layer_map = fit_layer(
                seen[layer],
                rows_of_down(block) if params.kind != "none" else s.new_zeros(s.shape[2], 0),
                kept,
                params,
                prior_means(calibration, layer),
                prior_counts=policy == "sensitive",
            )
            if layer_map is not None:
                corrector = AddCorrection(layer_map, rows.required)
                hook = block.inner[0].register_forward_pre_hook(corrector.see)
                undo.callback(hook.remove)
                undo.callback(block.down.register_forward_hook(corrector.add).remove)
        del seen  # what residuals were fitted to
        yield Sparsified(s=s, experts=slim)


def _selection(
    density: float, policy: PolicyName, seed: int, correction: CorrectionParams
) -> Selection:
    if not 0 < density <= 1:
        raise InvalidRequest("density", density, "(0, 1]")
    if policy not in POLICIES:
        raise InvalidRequest("policy", policy, ", ".join(POLICIES))
    if not 0 <= seed < 1 << 64:
        raise InvalidRequest("seed", seed, "[0, 2^64)")
    return Selection(density=density, policy=policy, seed=seed, correction=correction)


def _prompts(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """Returns the ids of each prompt without padding, and their mask in ``input_ids``, [N, P]
    bool."""
    if input_ids.is_floating_point() or input_ids.ndim not in (1, 2) or not input_ids.numel():
        given = f"{input_ids.dtype} {list(input_ids.shape)}"
        raise InvalidRequest("input_ids", given, "integers [N, P] or [P], at least one")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        allowed = f"{list(input_ids.shape)}, as input_ids"
        raise InvalidRequest("attention_mask", list(mask.shape), allowed)
    length = input_ids.shape[-1]
    ids = input_ids.reshape(-1, length).to(model.device)
    layout = mask.reshape(-1, length).to(model.device).bool()
    if not layout.any(dim=1).all():
        raise InvalidRequest("attention_mask", "a row of zeros", "at least one token in each row")
    prompts = [row[real] for row, real in zip(ids, layout, strict=True)]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for token in torch.cat(prompts).aminmax():
        if not 0 <= token < vocabulary:
            raise InvalidRequest("input_ids", int(token), f"[0, {vocabulary}), the vocabulary")
    return prompts, layout


# -- which tokens run on them ---------------------------------------------------------------------


class _Rows:
    """The rows of the running forward pass that belong to a completion.

    Args:
        prompts: the ids of N prompts.
        layout: [N, P] bool, the positions of these ids in a padded batch.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Tensor], layout: Tensor) -> None:
        self._prompts = pad_sequence(list(prompts), batch_first=True)
        self._lengths = layout.sum(dim=1)
        self._layout = layout
        self._parameters = tuple(signature(model.forward).parameters)
        self.pruned: Tensor | None = None
        """[B, T] bool; None while the model is not running."""

    def tell(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the arguments of the model's forward pass.

        Raises:
            InvalidRequest: they do not belong to these prompts and their completions.
        """
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if ids is None:
            allowed = "token ids, which tell the prompt from its completion"
            raise InvalidRequest("input_ids", "none inside sparsify", allowed)
        caches = [value for value in given.values() if isinstance(value, Cache)]
        begin = int(caches[0].get_seq_length()) if caches else 0
        end = begin + ids.shape[1]
        times, left = divmod(len(ids), len(self._prompts))
        if left or not times:
            allowed = f"a multiple of the {len(self._prompts)} prompts of sparsify"
            raise InvalidRequest("input_ids", f"{len(ids)} rows", allowed)
        real = self._real(given.get("attention_mask"), times, end).to(ids.device)
        position = real.cumsum(dim=1)[:, begin:] - 1
        of_prompt = real[:, begin:] & (position < self._repeated(self._lengths, times)[:, None])
        last = self._prompts.shape[1] - 1
        expected = self._repeated(self._prompts, times).gather(1, position.clamp(0, last))
        if (of_prompt & (ids != expected)).any():
            allowed = "those of sparsify, with the same padding in attention_mask"
            raise InvalidRequest("input_ids", "other prompts", allowed)
        self.pruned = ~of_prompt

    def required(self) -> Tensor:
        """Returns ``pruned`` while the model runs.

        Raises:
            InvalidRequest: only a part of it runs.
        """
        if self.pruned is None:
            raise InvalidRequest("model", "a part of it", "calls of the whole inside sparsify")
        return self.pruned

    def forget(self, *_: object) -> None:
        """Resets the rows at the end of a forward pass."""
        self.pruned = None

    def _real(self, mask: object, times: int, end: int) -> Tensor:
        """Returns the mask of all tokens so far that are not padding, [B, end] bool."""
        batch = times * len(self._prompts)
        if mask is None:
            return self._layout.new_ones((batch, end))
        if isinstance(mask, Tensor) and mask.ndim == 2:
            if mask.shape[0] != batch or mask.shape[1] < end:
                allowed = f"[{batch}, {end}], of all tokens so far"
                raise InvalidRequest("attention_mask", list(mask.shape), allowed)
            return mask[:, :end].bool()
        # If generate has made masks for pairs of tokens, the prompts are padded as in input_ids.
        real = self._layout.new_ones((batch, max(end, self._layout.shape[1])))
        real[:, : self._layout.shape[1]] = self._repeated(self._layout, times)
        return real[:, :end]

    @staticmethod
    def _repeated(of_prompts: Tensor, times: int) -> Tensor:
        """Repeats values like generate repeats its inputs: all beams or sequences of a prompt are
        adjacent."""
        return of_prompts.repeat_interleave(times, dim=0)


class _Prune:
    """A hook on a down projection that zeroes the activations of a completion's tokens outside the
    experts.

    Args:
        experts: [K].
    """

    def __init__(self, rows: _Rows, experts: Tensor, intermediate_size: int) -> None:
        self._rows = rows
        self._others = torch.ones(intermediate_size, dtype=torch.bool)
        self._others[experts.long()] = False

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0]
        pruned = self._rows.required()
        self._others = self._others.to(z.device)
        drop = pruned.to(z.device)[..., None] & self._others
        return (z.masked_fill(drop.reshape(z.shape), 0), *args[1:])
