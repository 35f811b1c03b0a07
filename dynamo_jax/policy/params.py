"""The parameters of the decoder, declared once: what model, shardings, optimizer and Hugging Face files know of them.

A new parameter is an entry here, and its use in `model.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dynamo_jax.config import ArchitectureConfig

# Axis letter (see `batch.py`) -> logical axis that the sharding rules know. The others are not split.
_LOGICAL = {"V": "vocab", "D": "embed", "A": "heads", "K": "kv_heads", "F": "mlp"}


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter.

    Ours has a dimension for every axis, in the order that the products want. Hugging Face stores a matrix as torch's
    Linear does, [outputs, inputs], the axes of each in one dimension: `to_hf` and `from_hf` go there and back.
    """

    axes: str  # the letter of each dimension; Z first: one of each layer, stacked
    hf: str  # name of its Hugging Face tensor; {Z}: the layer
    init: Literal["normal", "ones", "zeros"]  # normal: with variance 1 / fan-in, the product of the inputs
    inputs: str = ""  # the axes that a matrix sums over; none for a norm or a bias
    exists: Callable[[ArchitectureConfig], bool] = lambda _: True

    @property
    def per_layer(self) -> bool:
        return self.axes.startswith("Z")

    @property
    def decays(self) -> bool:
        """Whether weight decay is for it: it is for matrices, not for norms and biases."""
        return bool(self.inputs)

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """What the sharding rules split each dimension by. A norm over D is small, and every device needs all of it."""
        return tuple(_LOGICAL.get(letter) if self.inputs or letter != "D" else None for letter in self.axes)

    def shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        return tuple(sizes[letter] for letter in self.axes)

    def initial(self, sizes: dict[str, int], dtype: str, next_key: Callable[[], jax.Array]) -> jax.Array:
        """Initial values; only random ones take a key."""
        shape = self.shape(sizes)
        if self.init != "normal":
            return jnp.full(shape, self.init == "ones", dtype)
        fan_in = math.prod(sizes[letter] for letter in self.inputs)
        return jax.random.normal(next_key(), shape, dtype) * jnp.asarray(fan_in**-0.5, dtype)

    def hf_names(self, sizes: dict[str, int]) -> list[str]:
        """The tensors that make it up, in the order of its layers."""
        return [self.hf.format(Z=layer) for layer in range(sizes["Z"])] if self.per_layer else [self.hf]

    def hf_shape(self, sizes: dict[str, int]) -> tuple[int, ...]:
        """Shape of each of these tensors."""
        rows, columns = (math.prod(sizes[letter] for letter in letters) for letters in (self._outputs, self.inputs))
        return (rows, columns) if self.inputs else (rows,)

    def to_hf(self, x: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The tensor of one layer's values, or of all if they are not by layer."""
        return np.ascontiguousarray(x.transpose(self._order).reshape(self.hf_shape(sizes)))

    def from_hf(self, tensor: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The inverse of `to_hf`."""
        stored = tensor.reshape([sizes[letter] for letter in self._outputs + self.inputs])
        return stored.transpose(np.argsort(self._order))

    @property
    def _outputs(self) -> str:
        return "".join(letter for letter in self.axes.removeprefix("Z") if letter not in self.inputs)

    @property
    def _order(self) -> list[int]:
        return [self.axes.removeprefix("Z").index(letter) for letter in self._outputs + self.inputs]


def _has_bias(shape: ArchitectureConfig) -> bool:
    return shape.qkv_bias


def _has_head(shape: ArchitectureConfig) -> bool:
    return not shape.tie_word_embeddings


_LAYER = "model.layers.{Z}."

# Keys of random values are drawn in this order: a new entry with normal values after another changes that one's.
PARAMS: dict[str, Param] = {
    "embedding": Param("VD", "model.embed_tokens.weight", "normal", "D"),
    "attention_norm": Param("ZD", _LAYER + "input_layernorm.weight", "ones"),
    "q": Param("ZDAH", _LAYER + "self_attn.q_proj.weight", "normal", "D"),
    "k": Param("ZDKH", _LAYER + "self_attn.k_proj.weight", "normal", "D"),
    "v": Param("ZDKH", _LAYER + "self_attn.v_proj.weight", "normal", "D"),
    "q_bias": Param("ZAH", _LAYER + "self_attn.q_proj.bias", "zeros", exists=_has_bias),
    "k_bias": Param("ZKH", _LAYER + "self_attn.k_proj.bias", "zeros", exists=_has_bias),
    "v_bias": Param("ZKH", _LAYER + "self_attn.v_proj.bias", "zeros", exists=_has_bias),
    "o": Param("ZAHD", _LAYER + "self_attn.o_proj.weight", "normal", "AH"),
    "mlp_norm": Param("ZD", _LAYER + "post_attention_layernorm.weight", "ones"),
    "gate": Param("ZDF", _LAYER + "mlp.gate_proj.weight", "normal", "D"),
    "up": Param("ZDF", _LAYER + "mlp.up_proj.weight", "normal", "D"),
    "down": Param("ZFD", _LAYER + "mlp.down_proj.weight", "normal", "F"),
    "final_norm": Param("D", "model.norm.weight", "ones"),
    "lm_head": Param("VD", "lm_head.weight", "normal", "D", exists=_has_head),
}


def params_of(shape: ArchitectureConfig) -> dict[str, Param]:
    """The parameters that a decoder of this shape has, by name."""
    return {name: param for name, param in PARAMS.items() if param.exists(shape)}


def axis_sizes(shape: ArchitectureConfig) -> dict[str, int]:
    """Axis letter -> size. Raises `ValueError` if the shape leaves its vocabulary open."""
    if shape.vocab_size is None:
        raise ValueError("a decoder needs a vocab_size: give it, or take it from the tokenizer")
    return {
        "Z": shape.num_layers,
        "V": shape.vocab_size,
        "D": shape.hidden_size,
        "A": shape.num_heads,
        "K": shape.num_kv_heads,
        "H": shape.head_dim or shape.hidden_size // shape.num_heads,
        "F": shape.intermediate_size,
    }


def param_name(path: tuple[Any, ...]) -> str:
    """The parameter at this path of a tree of parameters, or of a tree that holds such trees (a training state)."""
    names = (getattr(key, "key", None) for key in path)
    return next(name for name in names if name in PARAMS)
