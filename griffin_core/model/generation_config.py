"""What a model's own generation_config.json says: its sampling, and the tokens that end a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers import GenerationConfig

from griffin_core.errors import BadModelFile

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Fields of a generation_config.json that change how a token is drawn, by the names that they have
there and in ``SamplingParams``."""

SamplingDefaults = Mapping[str, float | int]
"""Values by the names of ``SAMPLING_FIELDS``; a name that is missing keeps its plain default."""

NO_SAMPLING_DEFAULTS: SamplingDefaults = MappingProxyType({})
"""Plain defaults for every field: greedy."""


def load_generation_config(where: str) -> GenerationConfig | None:
    """The file of a directory or hub id; None if there is none, since the file is optional.

    Raises:
        BadModelFile: there is one, and it cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(where)
    except Exception as error:  # transformers raises OSError for a missing file and a broken one
        path = Path(where) / "generation_config.json"
        if not path.exists() and isinstance(error, OSError):
            return None
        raise BadModelFile(f"model: cannot read generation_config.json ({error})") from error


def sampling_defaults(config: GenerationConfig | None) -> SamplingDefaults:
    """How the authors of a model want its tokens drawn.

    ``do_sample`` false is temperature 0. ``do_sample`` true without a temperature is temperature 1,
    as transformers has it. A file that says neither leaves the temperature out; other fields count
    in any case, as in transformers.

    Args:
        config: see ``load_generation_config``.

    Returns:
        The fields that the file sets. They are not checked: ``SamplingParams`` does that.
    """
    if config is None:
        return NO_SAMPLING_DEFAULTS
    found = {name: getattr(config, name, None) for name in SAMPLING_FIELDS}
    values = {name: value for name, value in found.items() if value is not None}
    sample = getattr(config, "do_sample", None)
    if sample is False:
        values["temperature"] = 0.0
    elif sample:
        values.setdefault("temperature", 1.0)
    return values
