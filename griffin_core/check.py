"""A model looked at before it is served: what of its files is understood, and whether our logits
are those of transformers. What ``griffin check`` prints."""

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
from griffin_core.forward.prefill import PrefillFinished, prefill
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
"""How far apart logits may be, as a share of the largest: what sums in another order make."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Our logits beside transformers', in the same data type.

    Args:
        version: of transformers.
        positions: how many were compared.
        difference: the largest absolute difference of a logit.
        largest: the largest absolute logit of transformers'.
        agreeing: positions where the most likely token is the same.
        tolerance: the ``difference`` that rounding explains.
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
    """A model that can be served, and what was made of its files.

    Args:
        fields: what became of each field of its config.
        left_over: tensors of the checkpoint that the model does not take -> why.
        gguf: what its GGUF file says; None for a directory.
        comparison: None if transformers cannot load or run these files.
        not_compared: what transformers said then.
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
    progress: Progress = lambda _: None,
) -> Report:
    """Loads a model as a server would, and compares it with transformers.

    Args:
        name, device: as in ``load_model``.
        dtype: of both models.
        progress: told about each slow part.

    Raises:
        ModelError, DeviceMemoryExhausted, InvalidRequest: what loading refuses.
    """
    model = load_model(name, dtype=dtype, device=device, progress=progress)
    with quiet():
        directory = local_directory(name, resolve(name, dtype, progress))
        config, _ = read_config(directory)
        _, fields = examine_config(config)
        path = gguf_file(name)
        unused = {tensor: left_over(tensor) for tensor in stored_tensors(directory)}
        progress("comparing with transformers")
        comparison, why = None, ""
        try:
            comparison = _compare(model, _reference(directory, path, dtype))
        except BadModelFile as error:
            why = str(error)
        except Exception as error:  # whatever transformers raises is its answer
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
    """transformers' own reading of the weights. A GGUF's are read from the file itself, with the
    config that we have made of its keys, some of which transformers leaves out.

    Raises:
        BadModelFile: transformers does not find all tensors, and would make some up.
    """
    config = AutoConfig.from_pretrained(directory)
    where = {} if gguf is None else {"gguf_file": gguf.name}
    with redirect_stderr(StringIO()):  # its bars; what goes wrong is raised
        reference, info = AutoModelForCausalLM.from_pretrained(
            directory if gguf is None else gguf.parent,
            config=config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
            **where,
        )
    if made_up := sorted(info["missing_keys"]):  # of a split GGUF it reads one part
        raise BadModelFile(f"it reads no {made_up[0]} there, nor {len(made_up) - 1} others")
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
    """Tokens of the text, as many as the context holds; at least one."""
    spec = model.decoder.spec
    ids = [token for token in model.tokenizer.encode(SAMPLE) if token < spec.vocabulary]
    return (ids or [0])[: min(MOST_TOKENS, spec.context_length)]


def _logits(decoder: Decoder, ids: Sequence[int], first: int) -> Tensor:
    """[len(ids) - first + 1, V] float32: after a prompt of ``first`` tokens, and each later one."""
    cache = decoder.new_cache(len(ids))
    events = prefill(decoder, ids[:first], Selection(density=1.0), cache=cache)
    (finished,) = [event for event in events if isinstance(event, PrefillFinished)]
    logits = [decoder.head(finished.last_hidden[None].to(decoder.device, decoder.dtype))]
    if rest := list(ids[first:]):
        dense = [layer.ff for layer in decoder.layers]
        logits += decode_tokens(decoder, [StepTokens(cache=cache, view=dense, token_ids=rest)])
    return torch.cat(logits)
