"""Loading: a model's name in, everything that is needed to run it out."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from griffin_core.backends.select import backend_for
from griffin_core.errors import (
    BadModelFile,
    DeviceMemoryExhausted,
    InvalidRequest,
    ModelError,
)
from griffin_core.model.checkpoint import check_complete, left_over, stored_tensors
from griffin_core.model.decoder import Decoder
from griffin_core.model.families.config_fields import shown
from griffin_core.model.families.config_file import read_config
from griffin_core.model.families.registry import weights_from_state
from griffin_core.model.files import CONFIG_NAME, check_files, local_directory, one_line
from griffin_core.model.fingerprint import fingerprint
from griffin_core.model.generation_config import (
    SamplingDefaults,
    load_generation_config,
    sampling_defaults,
)
from griffin_core.model.hub import Progress, resolve
from griffin_core.model.trial import try_token
from griffin_core.spec.model import ModelSpec
from griffin_core.text.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Model:
    """A loaded model.

    Args:
        name: what was asked for, paths reduced to their last part.
        fingerprint: equal fingerprints give equal KV; see ``weights.fingerprint``.
        eos_ids: tokens that end a completion: all that generation_config.json, config.json and the
            tokenizer name.
        sampling_defaults: how the model's own generation_config.json wants tokens drawn.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    eos_ids: frozenset[int]
    sampling_defaults: SamplingDefaults = field(default_factory=dict, hash=False)


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32. On a CPU that takes AMX or
    AVX-512 bf16."""
    native = (
        device.type != "cpu"
        or torch.cpu._is_amx_tile_supported()
        or torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32


def load_model(
    model: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda _: None,
) -> Model:
    """Loads config, tokenizer and weights.

    Done on a thread that ends with it, so that the caller's keeps no OpenMP workers: see
    ``Engine``.

    Args:
        model: a directory, a path to a .gguf file, a hub id, or ``source.DEFAULT_MODEL``.
        dtype: of weights, activations and KV; ``default_dtype`` if None.
        device: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one.
        progress: told about each slow part.

    Raises:
        ModelNotFound, UnknownFamily, BadModelFile: see ``griffin_core.errors``.
        DeviceMemoryExhausted: the device has no room for the weights.
        InvalidRequest: no such device.
    """
    there = _device(device)
    with ThreadPoolExecutor(1, "griffin-load") as loader:
        try:
            return loader.submit(_load, model, dtype, there, progress).result()
        except ModelError as error:  # libraries below write several
            if len(str(error).splitlines()) == 1:
                raise
            raise type(error)(one_line(error)) from error


def _device(given: torch.device | str) -> torch.device:
    gpus = torch.cuda.device_count()
    if str(given) == "auto":
        return torch.device("cuda" if gpus else "cpu")
    names = [*(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    allowed = ["cpu", *names, "auto"]
    if str(given) not in allowed:
        here = "" if gpus else "; torch sees no CUDA device here"
        raise InvalidRequest("device", str(given), ", ".join(allowed) + here)
    return torch.device(given)


def _load(model: str, dtype: torch.dtype | None, device: torch.device, progress: Progress) -> Model:
    if not sys.stderr.isatty():  # bars are for people
        transformers_logging.disable_progress_bar()
    dtype = dtype or default_dtype(device)
    with quiet():
        directory = local_directory(model, resolve(model, dtype, progress))
        config, spec = read_config(directory)
        check_files(directory)
        check_weights(directory, config)
        generation = load_generation_config(str(directory))
        tokenizer = load_tokenizer(str(directory))
        check_tokenizer(tokenizer, spec.vocabulary)
        progress(f"loading {Path(model).name} as {str(dtype).removeprefix('torch.')} on {device}")
        state = _state(directory, dtype)
    decoder, on_device = decoder_on_device(spec, state, device)
    try_token(decoder, config.bos_token_id)
    return Model(
        name=Path(model).name if Path(model).exists() else model,
        decoder=decoder,
        tokenizer=tokenizer,
        fingerprint=fingerprint(spec, on_device),
        eos_ids=_eos_ids(str(directory), generation, tokenizer, spec.vocabulary),
        sampling_defaults=sampling_defaults(generation),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the libraries below say off standard error: what matters of it is raised."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def decoder_on_device(
    spec: ModelSpec, state: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[Decoder, Mapping[str, torch.Tensor]]:
    """The decoder, and the state where its weights are.

    Raises:
        DeviceMemoryExhausted: a GPU has no room for them. Found out before anything is copied, or
            while they are laid out, when some are there twice.
    """
    if device.type != "cuda":
        return decoder_of(spec, state), state
    size = sum(tensor.nbytes for tensor in state.values())
    free, _ = torch.cuda.mem_get_info(device)
    if size <= free:
        try:
            state = {name: tensor.to(device) for name, tensor in state.items()}
            return decoder_of(spec, state), state
        except torch.OutOfMemoryError:
            pass
    raise DeviceMemoryExhausted(
        f"the weights need {size / (1 << 30):.1f} GiB of {device}, and room to lay them out; "
        f"{free / (1 << 30):.1f} GiB are free there"
    )


def decoder_of(spec: ModelSpec, state: Mapping[str, torch.Tensor]) -> Decoder:
    """The decoder of a state dict whose tensors are all of one dtype, on one device."""
    first = next(iter(state.values()))
    backend = backend_for(first.device, first.dtype)
    return Decoder(spec, weights_from_state(spec, state, backend), backend)


def check_weights(directory: Path, config: PreTrainedConfig) -> None:
    """Holds the checkpoint of a directory against the model that its config describes. Reads what
    the files say about tensors, not the tensors themselves.

    Raises:
        BadModelFile: the checkpoint is not the whole model and nothing else.
    """
    stored = stored_tensors(directory)
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
    except Exception as error:  # each module checks its arguments in its own way
        raise BadModelFile(
            f"{CONFIG_NAME}: no model can be made of it: {one_line(error)}"
        ) from error
    check_complete(stored, module.state_dict(), module.all_tied_weights_keys)


def check_tokenizer(tokenizer: Tokenizer, vocabulary: int) -> None:
    """Refuses a tokenizer that makes tokens of ordinary text which the model does not have. Added
    tokens may be beyond its vocabulary: a prompt with one of them is refused.

    Raises:
        BadModelFile: naming a token.
    """
    if beyond := tokenizer.ordinary_tokens_from(vocabulary):
        raise BadModelFile(
            f"tokenizer: {len(beyond)} of its tokens, {shown(beyond[0])} for one, have ids beyond "
            f"the model's vocabulary; allowed: 0 to {vocabulary - 1}. Is it another model's?"
        )


def _state(directory: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that ``check_weights`` has passed."""
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",  # it is never run; others may not be installed
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as error:  # safetensors, torch and json each raise their own
        raise BadModelFile(f"cannot read the weights: {one_line(error)}") from error
    unexpected = [name for name in info["unexpected_keys"] if left_over(name) is None]
    if wrong := [*info["missing_keys"], *unexpected, *info["error_msgs"]]:
        raise BadModelFile(f"cannot read the weights: transformers does not load {wrong[:10]}")
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _eos_ids(
    where: str, generation: GenerationConfig | None, tokenizer: Tokenizer, vocabulary: int
) -> frozenset[int]:
    """All end-of-sequence tokens that generation_config.json, config.json and the tokenizer name.
    One that only stands in transformers' defaults for the family is none.

    Raises:
        BadModelFile: one of the files has a value that is no token id and no list of them.
    """
    stated, _ = PreTrainedConfig.get_config_dict(where)
    found = [tokenizer.eos_id]
    for file, value in (
        ("generation_config.json", None if generation is None else generation.eos_token_id),
        ("config.json", stated.get("eos_token_id")),
    ):
        ids = value if isinstance(value, list) else [value]
        if not all(token is None or type(token) is int for token in ids):
            raise BadModelFile(
                f"model: {file} has eos_token_id {value!r}; allowed: a token id or a list of them"
            )
        found += ids
    # Ids outside the vocabulary, -1 for one, are how some models say that there is none.
    return frozenset(token for token in found if token is not None and 0 <= token < vocabulary)
