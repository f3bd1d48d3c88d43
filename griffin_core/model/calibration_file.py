"""The file of a model's calibration: where it is found, how it is read and written.

It is a safetensors file with the three tensors of a ``Calibration``, and the rest as metadata. It
belongs to the weights, whatever the dtype that they are loaded in: its key is the fingerprint of
the weights as bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from griffin_core.errors import BadModelFile
from griffin_core.model.conversion_cache import cache_directory
from griffin_core.model.files import one_line
from griffin_core.model.fingerprint import fingerprint
from griffin_core.spec.calibration import Calibration, Recipe
from griffin_core.spec.choices import CORRECTION_KINDS, PolicyName
from griffin_core.spec.model import ModelSpec

PACKAGED = Path(__file__).parent / "calibrations"
"""The calibrations that come with Griffin, by key."""

NONE = "none"
"""In place of a file: no calibration, even if there is one."""

FORMAT = "1"
TENSORS = ("sensitivity", "mean_squares", "means")


def calibration_key(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """Returns 32 hexadecimal digits that are the same for the same weights in any dtype of which
    bfloat16 is a rounding."""
    return fingerprint(spec, state, torch.bfloat16)[:32]


def default_path(key: str) -> Path | None:
    """Where ``griffin calibrate`` writes if it is not told where; None without a home directory."""
    place = cache_directory()
    return None if place is None else place / "calibrations" / f"{key}.safetensors"


def find_calibration(
    given: str | None, key: str, spec: ModelSpec, device: torch.device
) -> Calibration | None:
    """Returns the calibration of a model: that of a file, or the one in the cache, or the packaged
    one; None if there is none.

    Args:
        given: a file; ``NONE``; or None to look where they are kept.
        key: of the model.

    Raises:
        BadModelFile: the file is not a calibration of this model.
    """
    if given == NONE:
        return None
    if given is not None:
        return read_calibration(Path(given), key, spec, device)
    for path in (default_path(key), PACKAGED / f"{key}.safetensors"):
        if path is not None and path.is_file():
            return read_calibration(path, key, spec, device)
    return None


def read_calibration(path: Path, key: str, spec: ModelSpec, device: torch.device) -> Calibration:
    """Reads a file.

    Raises:
        BadModelFile: it is not a calibration of the model with this key.
    """
    shape = (len(spec.layers), spec.intermediate_size)
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in TENSORS}
        if about.get("griffin_calibration") != FORMAT:
            raise ValueError(f"format {about.get('griffin_calibration')!r}; allowed: {FORMAT}")
        if about.get("key") != key:
            raise ValueError(f"it is of the model {about.get('key')!r}; this one is {key!r}")
        recipe = _recipe(json.loads(about["recipe"]))
        for name, tensor in tensors.items():
            if tensor.shape != shape or not tensor.isfinite().all():
                raise ValueError(f"{name}: got {tuple(tensor.shape)}; allowed: finite {shape}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BadModelFile(f"calibration {path}: {one_line(error)}") from error
    return make_calibration(**tensors, recipe=recipe, device=device)


def make_calibration(
    *,
    sensitivity: Tensor,
    mean_squares: Tensor,
    means: Tensor,
    recipe: Recipe,
    device: torch.device,
) -> Calibration:
    """Makes a calibration on a device, with the digest of its values. Values are rounded to
    bfloat16, as they are written, so that a calibration and its file have the same digest."""
    tensors = [each.bfloat16().cpu() for each in (sensitivity, mean_squares, means)]
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for each in tensors:
        digest.update(each.contiguous().view(torch.uint8).numpy().tobytes())
    one, two, three = (each.float().to(device) for each in tensors)
    return Calibration(
        sensitivity=one,
        mean_squares=two,
        means=three,
        recipe=recipe,
        digest=digest.hexdigest()[:16],
    )


def write_calibration(
    path: Path, calibration: Calibration, key: str, report: Mapping[str, object]
) -> None:
    """Writes a file, whole or not at all.

    Args:
        report: what was measured, for those who look into the file; JSON values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    save_file(
        {name: getattr(calibration, name).bfloat16().cpu().contiguous() for name in TENSORS},
        scratch,
        {
            "griffin_calibration": FORMAT,
            "key": key,
            "recipe": json.dumps(asdict(calibration.recipe)),
            "report": json.dumps(report),
        },
    )
    umask = os.umask(0)
    os.umask(umask)
    scratch.chmod(0o666 & ~umask)  # safetensors keeps it to its user
    scratch.replace(path)


def _recipe(fields: Mapping[str, object]) -> Recipe:
    policy, kind, rank = fields["policy"], fields["correction"], fields["rank"]
    if policy not in get_args(PolicyName) or kind not in CORRECTION_KINDS:
        raise ValueError(f"recipe: got {policy!r} with {kind!r}")
    if type(rank) is not int:
        raise ValueError(f"recipe: got rank {rank!r}; allowed: an integer")
    return Recipe(policy=policy, correction=kind, rank=rank)  # type: ignore[arg-type]  # checked
