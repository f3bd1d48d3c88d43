"""Makes parts of a decoder from the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from griffin_core.backends.base import Backend, FeedForward, Linear
from griffin_core.errors import BadModelFile
from griffin_core.spec.model import ModelSpec
from griffin_core.spec.weights import FFWeights, Norm


class TensorReader:
    """Reads tensors from a state dict, checks them, and has a backend lay them out. Every method
    raises BadModelFile for a tensor that is missing or has the wrong shape.

    Args:
        state: tensors by their names in Hugging Face checkpoints.
        backend: lays out the weights.
    """

    def __init__(self, spec: ModelSpec, state: Mapping[str, Tensor], backend: Backend) -> None:
        self.spec = spec
        self.used: set[str] = set()
        """The names that were read."""
        self._state = state
        self._backend = backend

    def optional(self, name: str) -> Tensor | None:
        """Returns a tensor, or None if there is none of that name."""
        self.used.add(name)
        return self._state.get(name)

    def get(self, name: str, *shape: int) -> Tensor:
        """Returns a tensor, which must have the given shape."""
        tensor = self.optional(name)
        if tensor is None:
            raise BadModelFile(f"weights: tensor {name!r} is missing")
        if shape and tuple(tensor.shape) != shape:
            raise BadModelFile(
                f"weights: tensor {name!r} has shape {tuple(tensor.shape)}; the config says {shape}"
            )
        return tensor

    def linear(self, name: str, out: int, inner: int) -> Linear:
        """Returns a product, with a bias if there is one."""
        return self._backend.pack_linear(
            self.get(f"{name}.weight", out, inner), self.optional(f"{name}.bias")
        )

    def qkv(self, attention: str) -> Linear:
        """Returns the products for queries, keys and values as one."""
        s = self.spec
        rows = {"q_proj": s.num_heads, "k_proj": s.num_kv_heads, "v_proj": s.num_kv_heads}
        names = [f"{attention}{name}" for name in rows]
        weights = [
            self.get(f"{name}.weight", heads * s.head_dim, s.hidden_size)
            for name, heads in zip(names, rows.values(), strict=True)
        ]
        biases = [b for name in names if (b := self.optional(f"{name}.bias")) is not None]
        if len(biases) not in (0, len(names)):
            raise BadModelFile(f"weights: some of {attention}[qkv]_proj have a bias, others do not")
        return self._backend.pack_linear(torch.cat(weights), torch.cat(biases) if biases else None)

    def norm(self, name: str, size: int) -> Norm:
        """Returns a norm over ``size`` values."""
        weight = self.optional(f"{name}.weight")  # OPT may have norms without weights
        if weight is None and self.spec.norm == "rms":
            raise BadModelFile(f"weights: tensor '{name}.weight' is missing")
        if weight is not None and tuple(weight.shape) != (size,):
            raise BadModelFile(f"weights: '{name}.weight' has shape {tuple(weight.shape)}")
        bias = self.optional(f"{name}.bias")
        return Norm(
            kind=self.spec.norm,
            eps=self.spec.norm_eps,
            weight=None if weight is None else weight.float() + self.spec.norm_offset,
            bias=None if bias is None else bias.float(),
        )

    def head(self, embedding: Tensor) -> Linear:
        """Returns the product that computes logits; it uses the embedding if the model ties the
        two."""
        own = self.optional("lm_head.weight")
        return self._backend.pack_linear(embedding if own is None else own)

    def ff(self, gate: str | None, up: str, down: str) -> FeedForward:
        """Returns an FF block; ``gate`` is None for a plain one."""
        s = self.spec
        inputs = (gate, up) if gate else (up,)
        if gate and any(f"{name}.bias" in self._state for name in inputs):
            raise BadModelFile(f"weights: a gated FF with a bias ('{up}.bias') is not supported")
        weights = FFWeights(
            activation=s.activation,
            w_in=torch.stack(
                [self.get(f"{name}.weight", s.intermediate_size, s.hidden_size) for name in inputs]
            ),
            down=self.get(f"{down}.weight", s.hidden_size, s.intermediate_size).t().contiguous(),
            up_bias=self.optional(f"{up}.bias"),
            down_bias=self.optional(f"{down}.bias"),
        )
        return self._backend.pack_ff(weights)
