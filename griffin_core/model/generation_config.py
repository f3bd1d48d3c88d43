"""A model's own generation_config.json: its sampling defaults, and its end-of-sequence tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from transformers import GenerationConfig

from griffin_core.errors import BadModelFile

SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The fields of a generation_config.json that change how a token is drawn. They have the same names
in ``SamplingParams``."""

SamplingDefaults = Mapping[str, float | int]
"""Values by the names in ``SAMPLING_FIELDS``; a missing name keeps its plain default."""

NO_SAMPLING_DEFAULTS: SamplingDefaults = MappingProxyType({})
"""Plain defaults for every field: greedy."""


def load_generation_config(where: str) -> GenerationConfig | None:
    """Loads the file of a directory or hub id; None if there is none, since the file is optional.

    Raises:
        BadModelFile: the file exists and cannot be read.
    """
    try:
        return GenerationConfig.from_pretrained(where)
    except Exception as error:  # transformers raises OSError for missing and for broken files
        path = Path(where) / "generation_config.json"
        if not path.exists() and isinstance(error, OSError):
            return None
        raise BadModelFile(f"model: cannot read generation_config.json ({error})") from error


def sampling_defaults(config: GenerationConfig | None) -> SamplingDefaults:
    """Returns the sampling defaults that the authors of a model recommend.

    ``do_sample`` false is temperature 0. ``do_sample`` true without a temperature is temperature 1,
    as in transformers. If the file sets neither, the temperature is left out; other fields count in
    any case, as in transformers.

    Args:
        config: see ``load_generation_config``.

    Returns:
        The fields that the file sets. ``SamplingParams`` checks their values.
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
