"""From the tensor names of Hugging Face checkpoints to the decoder's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from griffin_core.errors import BadModelFile
from griffin_core.model.decoder import DecoderWeights, Layer, Norm
from griffin_core.model.feedforward import FeedForward, Neurons
from griffin_core.model.linear import Linear
from griffin_core.spec.model import ModelSpec

FINGERPRINT_SAMPLES = 1024


def weights_from_state(spec: ModelSpec, state: Mapping[str, Tensor]) -> DecoderWeights:
    """Sorts a state dict of one of the known families into place.

    Queries, keys and values become one product, gate and up another; the FF's weights are kept by
    neuron. Nothing else of the state dict is copied, but for what ``Linear`` lays out anew.

    Raises:
        BadModelFile: a tensor is missing, has the wrong shape, or has no use.
    """
    reader = _Reader(spec, state)
    weights = reader.opt() if spec.family == "opt" else reader.llama_like()
    if unused := sorted(state.keys() - reader.used):
        raise BadModelFile(f"weights: tensors that the decoder does not use: {unused[:10]}")
    return weights


def fingerprint(spec: ModelSpec, state: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits over the spec and, of every tensor, its name, shape, dtype and
    evenly spaced samples: cheap for any size, different for any two trained models."""
    digest = hashlib.sha256(repr(spec).encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        samples = flat[:: max(1, flat.numel() // FINGERPRINT_SAMPLES)].contiguous().cpu()
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Reader:
    def __init__(self, spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
        self._spec = spec
        self._state = state
        self.used: set[str] = set()

    def _optional(self, name: str) -> Tensor | None:
        self.used.add(name)
        return self._state.get(name)

    def _get(self, name: str, *shape: int) -> Tensor:
        tensor = self._optional(name)
        if tensor is None:
            raise BadModelFile(f"weights: tensor {name!r} is missing")
        if shape and tuple(tensor.shape) != shape:
            raise BadModelFile(
                f"weights: tensor {name!r} has shape {tuple(tensor.shape)}; the config says {shape}"
            )
        return tensor

    def _linear(self, name: str, out: int, inner: int) -> Linear:
        return Linear(self._get(f"{name}.weight", out, inner), self._optional(f"{name}.bias"))

    def _qkv(self, attention: str) -> Linear:
        s = self._spec
        rows = {"q_proj": s.heads, "k_proj": s.kv_heads, "v_proj": s.kv_heads}
        names = [f"{attention}{name}" for name in rows]
        weights = [
            self._get(f"{name}.weight", heads * s.head_dim, s.width)
            for name, heads in zip(names, rows.values(), strict=True)
        ]
        biases = [b for name in names if (b := self._optional(f"{name}.bias")) is not None]
        if len(biases) not in (0, len(names)):
            raise BadModelFile(f"weights: some of {attention}[qkv]_proj have a bias, others none")
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def _norm(self, name: str, size: int) -> Norm:
        weight = self._optional(f"{name}.weight")  # OPT may have norms without weights
        if weight is None and self._spec.norm == "rms":
            raise BadModelFile(f"weights: tensor '{name}.weight' is missing")
        if weight is not None and tuple(weight.shape) != (size,):
            raise BadModelFile(f"weights: '{name}.weight' has shape {tuple(weight.shape)}")
        bias = self._optional(f"{name}.bias")
        return Norm(
            kind=self._spec.norm,
            eps=self._spec.norm_eps,
            weight=None if weight is None else weight.float() + self._spec.norm_offset,
            bias=None if bias is None else bias.float(),
        )

    def _head(self, embedding: Tensor) -> Tensor:
        own = self._optional("lm_head.weight")
        return embedding if own is None else own

    def llama_like(self) -> DecoderWeights:
        s = self._spec
        embedding = self._get("model.embed_tokens.weight", s.vocabulary, s.width)
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._llama_layer(f"model.layers.{i}.") for i in range(len(s.layers))),
            final_norm=self._norm("model.norm", s.width),
            head=Linear(self._head(embedding)),
        )

    def _llama_layer(self, prefix: str) -> Layer:
        s = self._spec
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        post_attention = f"{prefix}post_attention_layernorm"
        return Layer(
            qkv=self._qkv(attention),
            o=self._linear(f"{attention}o_proj", s.width, s.heads * s.head_dim),
            neurons=(
                neurons := self._neurons(f"{mlp}gate_proj", f"{mlp}up_proj", f"{mlp}down_proj")
            ),
            ff=FeedForward(neurons),
            attention_norm=self._norm(f"{prefix}input_layernorm", s.width),
            ff_norm=self._norm(
                f"{prefix}pre_feedforward_layernorm" if s.sandwich_norms else post_attention,
                s.width,
            ),
            q_norm=self._norm(f"{attention}q_norm", s.head_dim) if s.query_key_norm else None,
            k_norm=self._norm(f"{attention}k_norm", s.head_dim) if s.query_key_norm else None,
            attention_out_norm=self._norm(post_attention, s.width) if s.sandwich_norms else None,
            ff_out_norm=self._norm(f"{prefix}post_feedforward_layernorm", s.width)
            if s.sandwich_norms
            else None,
        )

    def opt(self) -> DecoderWeights:
        s = self._spec
        root = "model.decoder."
        embedding = self._get(f"{root}embed_tokens.weight", s.vocabulary, s.embed_width)
        rows = s.context_length + s.position_offset
        return DecoderWeights(
            embedding=embedding,
            layers=tuple(self._opt_layer(f"{root}layers.{i}.") for i in range(len(s.layers))),
            final_norm=self._norm(f"{root}final_layer_norm", s.width) if s.final_norm else None,
            head=Linear(self._head(embedding)),
            positions=self._get(f"{root}embed_positions.weight", rows, s.width),
            project_in=self._optional(f"{root}project_in.weight"),
            project_out=self._optional(f"{root}project_out.weight"),
        )

    def _opt_layer(self, prefix: str) -> Layer:
        s = self._spec
        attention = f"{prefix}self_attn."
        return Layer(
            qkv=self._qkv(attention),
            o=self._linear(f"{attention}out_proj", s.width, s.width),
            neurons=(neurons := self._neurons(None, f"{prefix}fc1", f"{prefix}fc2")),
            ff=FeedForward(neurons),
            attention_norm=self._norm(f"{prefix}self_attn_layer_norm", s.width),
            ff_norm=self._norm(f"{prefix}final_layer_norm", s.width),
        )

    def _neurons(self, gate: str | None, up: str, down: str) -> Neurons:
        s = self._spec
        inputs = (gate, up) if gate else (up,)
        if gate and any(f"{name}.bias" in self._state for name in inputs):
            raise BadModelFile(f"weights: a gated FF with a bias ('{up}.bias') is not known")
        return Neurons(
            activation=s.activation,
            w_in=torch.stack([self._get(f"{name}.weight", s.ff_width, s.width) for name in inputs]),
            down=self._get(f"{down}.weight", s.width, s.ff_width).t().contiguous(),
            up_bias=self._optional(f"{up}.bias"),
            down_bias=self._optional(f"{down}.bias"),
        )
