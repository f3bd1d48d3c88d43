"""What transformers makes of a model's directory, and what Griffin makes of it."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from griffin_core.errors import ModelError
from griffin_core.model.checkpoint import LEFT_OVER
from griffin_core.model.decoder import Decoder
from griffin_core.model.load import load_model
from tests.tiny import VOCABULARY

TOKENS = torch.randint(0, VOCABULARY - 20, (24,), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
def transformers_logits(directory: Path, tokens: int) -> Tensor | None:
    """[T, V] float32 for the first T of ``TOKENS``; None where transformers raises, or makes up or
    leaves out tensors."""
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            unexpected = [
                name
                for name in info["unexpected_keys"]
                if not any(re.search(pattern, name) for pattern in LEFT_OVER)
            ]
            if info["missing_keys"] or unexpected or info["mismatched_keys"]:
                return None
            model.config.return_dict = True
            logits: Tensor = model(TOKENS[None, :tokens], use_cache=False).logits[0]
    except Exception:
        return None
    finally:
        logging.set_verbosity_warning()
    return logits


@torch.inference_mode()
def decoder_logits(decoder: Decoder) -> Tensor:
    """[T, V] float32 for ``TOKENS``, or as many as the context takes, read in two parts, so that
    the second sees cached keys."""
    tokens = TOKENS[: decoder.spec.context_length]
    cache = decoder.new_cache(len(tokens))
    logits = []
    for part in tokens.split(16):
        x, attention = decoder.prepare_batch(part, [(cache, len(part))])
        for index, layer in enumerate(decoder.layers):
            x = decoder.layer(index, x, attention, layer.ff)
        cache.advance(len(part))
        logits.append(decoder.logits(x))
    return torch.cat(logits)


def griffin_logits(directory: Path) -> Tensor | str:
    """See ``decoder_logits``; or the words with which the model was refused."""
    try:
        return decoder_logits(
            load_model(str(directory), dtype=torch.float32, allow_pickle=True).decoder
        )
    except ModelError as error:
        return str(error)


def assert_equal_or_refused(directory: Path) -> str | None:
    """Holds Griffin against transformers on one directory: equal logits, or refused in one line.
    Where transformers has no logits that come from the file, Griffin must refuse.

    Returns:
        The words of a refusal; None if the logits are equal.
    """
    ours = griffin_logits(directory)
    if isinstance(ours, str):
        assert "\n" not in ours and len(ours) < 2000, ours
        return ours
    expected = transformers_logits(directory, len(ours))
    assert expected is not None, "transformers has no logits of this model; Griffin has"
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    return None
