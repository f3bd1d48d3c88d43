"""Loads a model by its name, with everything that is needed to run it."""

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
from griffin_core.model.calibration_file import calibration_key, find_calibration
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
        name: the requested name; of a path, the last part.
        fingerprint: models with equal fingerprints compute equal KV; see ``fingerprint``.
        calibration_key: names its calibration; see ``calibration_key``.
        eos_ids: the tokens that end a completion: all that generation_config.json, config.json and
            the tokenizer name.
        sampling_defaults: the sampling defaults in the model's own generation_config.json.
    """

    name: str
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    calibration_key: str
    eos_ids: frozenset[int]
    sampling_defaults: SamplingDefaults = field(default_factory=dict, hash=False)


def default_dtype(device: torch.device) -> torch.dtype:
    """Returns bfloat16 if the device multiplies it natively, else float32. A CPU needs AMX or
    AVX-512 bf16 for that."""
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
    allow_pickle: bool = False,
    calibration: str | None = None,
    progress: Progress = lambda _: None,
) -> Model:
    """Loads config, tokenizer and weights.

    It runs on a thread that ends with it, so that the caller's thread keeps no OpenMP workers: see
    ``Engine``.

    Args:
        model: a directory, a path to a .gguf file, a hub id, or ``source.DEFAULT_MODEL``.
        dtype: the type of weights, activations and KV; ``default_dtype`` if None.
        device: "cpu", "cuda", "cuda:N", or "auto" for the first GPU if there is one.
        allow_pickle: whether weights may come from ``pytorch_model.bin``; see ``stored_tensors``.
        calibration: the file of its calibration, see ``find_calibration``.
        progress: called with a sentence about each slow part.

    Raises:
        ModelNotFound, UnknownFamily, BadModelFile: see ``griffin_core.errors``.
        DeviceMemoryExhausted: the device has no room for the weights.
        InvalidRequest: the device does not exist.
    """
    there = _device(device)
    with ThreadPoolExecutor(1, "griffin-load") as loader:
        try:
            return loader.submit(
                _load, model, dtype, there, allow_pickle, calibration, progress
            ).result()
        except ModelError as error:  # the libraries write several lines
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


def _load(
    model: str,
    dtype: torch.dtype | None,
    device: torch.device,
    allow_pickle: bool,
    calibration: str | None,
    progress: Progress,
) -> Model:
    if not sys.stderr.isatty():  # progress bars are for terminals only
        transformers_logging.disable_progress_bar()
    dtype = dtype or default_dtype(device)
    with quiet():
        where = resolve(model, dtype, progress)
        directory = local_directory(model, where, allow_pickle=allow_pickle)
        config, spec = read_config(directory)
        check_files(directory)
        check_weights(directory, config, allow_pickle=allow_pickle)
        generation = load_generation_config(str(directory))
        tokenizer = load_tokenizer(str(directory))
        check_tokenizer(tokenizer, spec.vocab_size)
        progress(f"loading {Path(model).name} as {str(dtype).removeprefix('torch.')} on {device}")
        state = _state(directory, dtype, allow_pickle=allow_pickle)
    decoder, on_device = decoder_on_device(spec, state, device)
    try_token(decoder, config.bos_token_id)
    key = calibration_key(spec, on_device)
    decoder.calibration = find_calibration(calibration, key, spec, device)
    return Model(
        name=Path(model).name if Path(model).exists() else model,
        decoder=decoder,
        tokenizer=tokenizer,
        fingerprint=fingerprint(spec, on_device),
        calibration_key=key,
        eos_ids=_eos_ids(str(directory), generation, tokenizer, spec.vocab_size),
        sampling_defaults=sampling_defaults(generation),
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' messages off standard error; important ones are raised as errors."""
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
    """Returns the decoder, and the state dict on its device.

    Raises:
        DeviceMemoryExhausted: a GPU has no room for the weights. This is checked before anything is
            copied, and can also happen while the weights are laid out, when some exist twice.
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
    """Returns the decoder of a state dict whose tensors all have one dtype and device."""
    first = next(iter(state.values()))
    backend = backend_for(first.device, first.dtype)
    return Decoder(spec, weights_from_state(spec, state, backend), backend)


def check_weights(directory: Path, config: PreTrainedConfig, *, allow_pickle: bool = False) -> None:
    """Checks the checkpoint of a directory against the model that its config describes. It reads
    only the metadata of tensors.

    Raises:
        BadModelFile: the tensors are not exactly those of the model.
    """
    stored = stored_tensors(directory, allow_pickle=allow_pickle)
    try:
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
            )
    except Exception as error:  # each module raises errors of its own
        raise BadModelFile(
            f"{CONFIG_NAME}: cannot make a model of it: {one_line(error)}"
        ) from error
    check_complete(stored, module.state_dict(), module.all_tied_weights_keys)


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a tokenizer that can turn ordinary text into tokens that the model does not have.
    Added tokens may be beyond the vocabulary: a prompt that contains one is refused.

    Raises:
        BadModelFile: the message names a token.
    """
    if beyond := tokenizer.ordinary_tokens_from(vocab_size):
        raise BadModelFile(
            f"tokenizer: {len(beyond)} of its tokens, {shown(beyond[0])} for one, have ids beyond "
            f"the model's vocabulary; allowed: 0 to {vocab_size - 1}. Is it another model's?"
        )


def _state(directory: Path, dtype: torch.dtype, *, allow_pickle: bool) -> dict[str, torch.Tensor]:
    """Loads the tensors of a checkpoint that ``check_weights`` has checked."""
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation="eager",  # never run; others may not be installed
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=None if allow_pickle else True,
        )
    except Exception as error:  # safetensors, torch and json each raise errors of their own
        raise BadModelFile(f"cannot read the weights: {one_line(error)}") from error
    unexpected = [name for name in info["unexpected_keys"] if left_over(name) is None]
    if wrong := [*info["missing_keys"], *unexpected, *info["error_msgs"]]:
        raise BadModelFile(f"cannot read the weights: transformers does not load {wrong[:10]}")
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def _eos_ids(
    where: str, generation: GenerationConfig | None, tokenizer: Tokenizer, vocab_size: int
) -> frozenset[int]:
    """Returns all end-of-sequence tokens that generation_config.json, config.json and the tokenizer
    name. Defaults of transformers for the family do not count.

    Raises:
        BadModelFile: one of the files has a value that is neither a token id nor a list of them.
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
    # Some models use an id outside the vocabulary, such as -1, to say that there is none.
    return frozenset(token for token in found if token is not None and 0 <= token < vocab_size)
