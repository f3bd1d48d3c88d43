"""Checks a model before it is served: how its files are read, and whether our logits equal those of
transformers. ``griffin check`` prints the report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from griffin_core.errors import BadModelFile
from griffin_core.experts.selection import Selection
from griffin_core.forward.decode import StepTokens, decode_tokens
from griffin_core.forward.events import (
    PrefillFinished,
)
from griffin_core.forward.prefill import prefill
from griffin_core.model.checkpoint import left_over, stored_tensors
from griffin_core.model.decoder import Decoder
from griffin_core.model.families.config_fields import FieldUse
from griffin_core.model.families.config_file import read_config
from griffin_core.model.families.registry import examine_config
from griffin_core.model.files import local_directory, one_line
from griffin_core.model.gguf import Understood, understand
from griffin_core.model.hub import Progress, gguf_file, resolve
from griffin_core.model.load import Model, load_model, quiet

SAMPLE = "The quick brown fox jumps over the lazy dog. 1 + 1 = 2; naïve café, 東京 🙂"
MOST_TOKENS = 32

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}
"""The allowed difference of logits as a share of the largest logit, which comes from summing in
another order."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of our logits with those of transformers, in the same data type.

    Args:
        version: the version of transformers.
        positions: the number of positions that were compared.
        difference: the largest absolute difference of a logit.
        largest: the largest absolute logit of transformers.
        agreeing: the number of positions with the same most likely token.
        tolerance: the largest ``difference`` that rounding explains.
    """

    version: str
    positions: int
    difference: float
    largest: float
    agreeing: int
    tolerance: float

    @property
    def equal(self) -> bool:
        """Whether rounding explains the difference."""
        return self.difference <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report on a model that can be served.

    Args:
        fields: how each field of its config is treated.
        left_over: the tensors of the checkpoint that the model does not use -> why.
        gguf: the contents of its GGUF file; None for a directory.
        comparison: None if transformers cannot load or run these files.
        not_compared: the error of transformers in that case.
    """

    model: Model
    fields: tuple[FieldUse, ...]
    left_over: dict[str, str]
    gguf: Understood | None
    comparison: Comparison | None
    not_compared: str


def check_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    allow_pickle: bool = False,
    progress: Progress = lambda _: None,
) -> Report:
    """Loads a model as a server would, and compares it with transformers.

    Args:
        name, device, allow_pickle: as in ``load_model``.
        dtype: the type of both models.
        progress: called with a sentence about each slow part.

    Raises:
        ModelError, DeviceMemoryExhausted, InvalidRequest: the model cannot be loaded.
    """
    model = load_model(
        name, dtype=dtype, device=device, allow_pickle=allow_pickle, progress=progress
    )
    with quiet():
        directory = local_directory(name, resolve(name, dtype, progress), allow_pickle=allow_pickle)
        config, _ = read_config(directory)
        _, fields = examine_config(config)
        path = gguf_file(name)
        stored = stored_tensors(directory, allow_pickle=allow_pickle)
        unused = {tensor: left_over(tensor) for tensor in stored}
        progress("comparing with transformers")
        comparison, why = None, ""
        try:
            comparison = _compare(model, _reference(directory, path, dtype))
        except BadModelFile as error:
            why = str(error)
        except Exception as error:  # any error of transformers goes into the report
            why = f"{type(error).__name__}: {one_line(error)}"
        return Report(
            model=model,
            fields=fields,
            left_over={tensor: reason for tensor, reason in unused.items() if reason},
            gguf=None if path is None else understand(path),
            comparison=comparison,
            not_compared=why,
        )


def _reference(directory: Path, gguf: Path | None, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the weights with transformers. A GGUF file is read by transformers too, but with our
    config, since transformers ignores some of its keys.

    Raises:
        BadModelFile: transformers does not find all tensors, and would initialize some randomly.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    where = {} if gguf is None else {"gguf_file": gguf.name}
    with redirect_stderr(StringIO()):  # hides its progress bars; errors are raised
        reference, info = AutoModelForCausalLM.from_pretrained(
            directory if gguf is None else gguf.parent,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **where,
        )
    if made_up := sorted(info["missing_keys"]):  # transformers reads one part of a split GGUF
        raise BadModelFile(f"it does not find {made_up[0]} there, nor {len(made_up) - 1} others")
    return cast(PreTrainedModel, reference)


@torch.inference_mode()
def _compare(model: Model, reference: PreTrainedModel) -> Comparison:
    """Runs one short text: the first half as a prompt, the rest as steps of generation."""
    decoder = model.decoder
    ids = _sample(model)
    first = max(1, len(ids) // 2)
    reference = reference.to(decoder.device).eval()
    theirs = reference(torch.tensor([ids], device=decoder.device)).logits[0, first - 1 :].float()
    ours = _logits(decoder, ids, first)
    largest = theirs.abs().max().item()
    return Comparison(
        version=transformers.__version__,
        positions=len(theirs),
        difference=(ours - theirs).abs().max().item(),
        largest=largest,
        agreeing=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        tolerance=TOLERANCES[decoder.dtype] * max(1.0, largest),
    )


def _sample(model: Model) -> list[int]:
    """Returns the tokens of the text, as many as the context holds; at least one."""
    spec = model.decoder.spec
    ids = [token for token in model.tokenizer.encode(SAMPLE) if token < spec.vocab_size]
    return (ids or [0])[: min(MOST_TOKENS, spec.context_length)]


def _logits(decoder: Decoder, ids: Sequence[int], first: int) -> Tensor:
    """Returns the logits after a prompt of ``first`` tokens and after each later token, [len(ids) -
    first + 1, V] float32."""
    cache = decoder.new_cache(len(ids))
    events = prefill(decoder, ids[:first], Selection(density=1.0), cache=cache)
    (finished,) = [event for event in events if isinstance(event, PrefillFinished)]
    logits = [decoder.head(finished.last_hidden[None].to(decoder.device, decoder.dtype))]
    if rest := list(ids[first:]):
        dense = [layer.ff for layer in decoder.layers]
        logits += decode_tokens(decoder, [StepTokens(cache=cache, view=dense, token_ids=rest)])
    return torch.cat(logits)
