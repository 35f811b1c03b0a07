"""The policy: a decoder of Qwen2's shape (Flax NNX) that returns final hidden states, never logits.

Layers are stacked and scanned, so that compile time does not grow with depth. Logits are made where they are
consumed, a few tokens at a time (`kernels.token_stats`), or for one position (`rollout.sampler`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding

from dynamo_jax.config import ArchitectureConfig
from dynamo_jax.config.choices import Remat
from dynamo_jax.kernels.attention import attention, segment_attention
from dynamo_jax.kernels.attention_tpu import RESIDUALS
from dynamo_jax.policy.params import PARAMS, axis_sizes, param_name, params_of
from dynamo_jax.policy.products import Product, copies, gathered, lookup, product
from dynamo_jax.sharding import sharding

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# What the backward pass keeps of a layer beside its input: nothing, what attention gave, or all products too.
KEPT: dict[Remat, tuple[str, ...]] = {"full": (), "attention": (RESIDUALS,), "dots": (RESIDUALS, "product")}


class KVCache(NamedTuple):
    """Keys and values of every layer."""

    k_ZBSKH: jax.Array
    v_ZBSKH: jax.Array


class Tables(NamedTuple):
    """What has a row for each token of the vocabulary, [X, V, D]: see `products.copies`."""

    embedding: jax.Array
    head: jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything static about a decoder. `shape` has its head_dim and vocab_size filled in."""

    shape: ArchitectureConfig
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    remat: Remat = "none"
    mesh: Mesh | None = None


class Blocks(nnx.Module):
    """All layers: the stacked parameters of the table. Called on one layer's slice of them, inside a scan."""

    def __init__(self, config: DecoderConfig, params: dict[str, nnx.Param[jax.Array]]) -> None:
        self.config = config
        for name, param in params.items():
            setattr(self, name, param)

    def __call__(
        self, x_BQD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend, gather: bool = True
    ) -> tuple[jax.Array, Any]:
        """One pre-norm layer. `attend` maps (q, k, v) to (output, what the caller keeps of k and v).

        `gather`: multiply with whole weights, which is for many tokens; without, the compiler decides.
        """
        dot = partial(self._dot, gather=gather)
        shape = self.config.shape
        y_BQD = _rms_norm(x_BQD, self.attention_norm[...], shape.rms_norm_eps)
        q_BQAH = dot("bqd,dah->bqah", y_BQD, "q")
        k_BQKH = dot("bqd,dkh->bqkh", y_BQD, "k")
        v_BQKH = dot("bqd,dkh->bqkh", y_BQD, "v")
        if shape.qkv_bias:
            q_BQAH = _plus(q_BQAH, self.q_bias[...])
            k_BQKH = _plus(k_BQKH, self.k_bias[...])
            v_BQKH = _plus(v_BQKH, self.v_bias[...])
        out_BQAH, kept = attend(_rotate(q_BQAH, *rope), _rotate(k_BQKH, *rope), v_BQKH)
        # einsum sums in the order of its letters: H comes before a, so that the last bits stay what they were.
        x_BQD = x_BQD + dot("bqaH,aHd->bqd", out_BQAH, "o")
        y_BQD = _rms_norm(x_BQD, self.mlp_norm[...], shape.rms_norm_eps)
        gate_BQF = jax.nn.silu(dot("bqd,df->bqf", y_BQD, "gate"))
        up_BQF = dot("bqd,df->bqf", y_BQD, "up")
        return x_BQD + dot("bqf,fd->bqd", gate_BQF * up_BQF, "down"), kept

    def _dot(self, equation: str, x: jax.Array, name: str, gather: bool) -> jax.Array:
        weight: jax.Array = getattr(self, name)[...]
        precision = _precision(self.config.compute_dtype)
        if not gather:
            return jnp.einsum(equation, x, weight.astype(x.dtype), precision=precision)
        plan = Product(equation, PARAMS[name].logical_axes[1:], precision, self.config.mesh)
        return checkpoint_name(product(plan, x, weight), "product")


class Decoder(nnx.Module):
    """Tokens -> final hidden states, in the compute dtype. `head()` is what turns them into logits."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        sizes, made = axis_sizes(config.shape), {}
        for name, param in params_of(config.shape).items():
            made[name] = nnx.Param(param.initial(sizes, config.param_dtype, rngs.params))
            if not param.per_layer:
                setattr(self, name, made[name])
        self.blocks = Blocks(config, {name: x for name, x in made.items() if PARAMS[name].per_layer})

    def head(self) -> jax.Array:
        """[V, D] in the parameter dtype; logits = hidden @ head.T."""
        return (self.embedding if self.config.shape.tie_word_embeddings else self.lm_head)[...]

    def logits(self, hidden_BD: jax.Array) -> jax.Array:
        """float32 [B, V] of a few positions. For whole sequences use `kernels.token_stats`."""
        head = self.head().astype(hidden_BD.dtype)
        precision = _precision(self.config.compute_dtype)
        return jnp.einsum("bd,vd->bv", hidden_BD, head, precision=precision, preferred_element_type=jnp.float32)

    def tables(self) -> Tables:
        """The embedding and the head as training reads them: in the compute dtype, a copy for each shard of rows."""
        embedding = copies(self.embedding[...].astype(self.config.compute_dtype), self.config.mesh)
        if self.config.shape.tie_word_embeddings:
            return Tables(embedding, embedding)
        return Tables(embedding, copies(self.lm_head[...].astype(self.config.compute_dtype), self.config.mesh))

    def __call__(self, tokens_BS: jax.Array, valid_BS: jax.Array) -> jax.Array:
        """Hidden states [B, S, D] of whole sequences, one a row.

        tokens_BS: int32. valid_BS: bool, real tokens: one run in each row, padding left and right of it. The hidden
        state in slot s predicts the token in slot s + 1; those of padding slots mean nothing.
        """
        # A token's position is its rank among the real tokens of its row, wherever the padding is.
        position_BS = jnp.maximum(jnp.cumsum(valid_BS, axis=1) - 1, 0)
        x_BSD = self.embedded(tokens_BS, self.tables().embedding)
        return self.packed(x_BSD, valid_BS.astype(jnp.int32), position_BS)

    def packed(self, x_GSD: jax.Array, segment_GS: jax.Array, position_GS: jax.Array) -> jax.Array:
        """Hidden states [G, S, D] of rows that hold several sequences each, for training and scoring.

        Args:
            x_GSD: the tokens' embeddings, of `embedded`.
            segment_GS: int32, the sequence of each token: those of a row that have one number, in order.
            position_GS: int32, the token's place in its sequence, from 0.
        """
        rope = self._rope(position_GS)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            out = segment_attention(q, k, v, segment_GS, mesh=self.config.mesh)
            return checkpoint_name(out, RESIDUALS), None

        return self._whole(x_GSD, rope, attend)[0]

    def embedded(self, tokens_GS: jax.Array, embedding_XVD: jax.Array) -> jax.Array:
        """[G, S, D] of int32 tokens, by the embedding of `tables`."""
        return self._constrain(lookup(embedding_XVD, tokens_GS, self.config.mesh))

    def prefill(self, tokens_BS: jax.Array, valid_BS: jax.Array) -> tuple[jax.Array, KVCache]:
        """As `__call__`, and the keys and values of all S slots."""
        slot_S = jnp.arange(tokens_BS.shape[1])
        rope = self._rope(jnp.maximum(jnp.cumsum(valid_BS, axis=1) - 1, 0))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return attention(q, k, v, slot_S, valid_BS), (k, v)

        hidden, kept = self._whole(self._embed(tokens_BS), rope, attend)
        return hidden, KVCache(*kept)

    def decode(
        self, token_B: jax.Array, position_B: jax.Array, slot: jax.Array, valid_BS: jax.Array, cache: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states [B, D] of one token a row, written to cache slot `slot`; `valid_BS` includes that slot."""
        slot_Q = slot[None]

        def attend(layer: jax.Array, cache: KVCache) -> Attend:
            def run(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache]:
                # The whole cache is the loop's carry and is written in place; as scan outputs it would be copied.
                new = KVCache(*(_write(old, x, layer, slot) for old, x in zip(cache, (k, v), strict=True)))
                keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in new)
                return attention(q, keys, values, slot_Q, valid_BS), new

            return run

        rope = self._rope(position_B[:, None])
        graph, layers = nnx.split(self.blocks)

        def body(carry: tuple[jax.Array, KVCache], layer: Any) -> tuple[tuple[jax.Array, KVCache], None]:
            x, cache = carry
            index, weights = layer
            x, cache = nnx.merge(graph, weights)(x, rope, attend(index, cache), gather=False)
            return (self._constrain(x), cache), None

        indices = jnp.arange(self.config.shape.num_layers)
        (x_B1D, cache), _ = jax.lax.scan(body, (self._embed(token_B[:, None]), cache), (indices, layers))
        return self._final(x_B1D)[:, 0], cache

    def _whole(self, x_BSD: jax.Array, rope: tuple[jax.Array, jax.Array], attend: Attend) -> tuple[jax.Array, Any]:
        graph, layers = nnx.split(self.blocks)

        def body(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
            x, kept = nnx.merge(graph, weights)(x, rope, attend)
            return self._constrain(x), kept

        if self.config.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*KEPT[self.config.remat])
            # Inside a scan nothing is shared between the two passes anyway.
            body = jax.checkpoint(body, policy=policy, prevent_cse=False)
        x_BSD, kept = jax.lax.scan(body, x_BSD, layers)
        return self._final(x_BSD), kept

    def _embed(self, tokens_BQ: jax.Array) -> jax.Array:
        # Gathered over fsdp first: a row look-up in a table split by columns copies more.
        table = self.embedding[...].astype(self.config.compute_dtype)
        return self._constrain(gathered(table, PARAMS["embedding"].logical_axes, self.config.mesh)[tokens_BQ])

    def _final(self, x_BQD: jax.Array) -> jax.Array:
        return _rms_norm(x_BQD, self.final_norm[...], self.config.shape.rms_norm_eps)

    def _rope(self, position_BQ: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = axis_sizes(self.config.shape)["H"] // 2
        frequency = self.config.shape.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
        angle = position_BQ[..., None].astype(jnp.float32) * frequency  # radians
        return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]

    def _constrain(self, x: jax.Array) -> jax.Array:
        if self.config.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, sharding(self.config.mesh, "batch"))


def _precision(compute_dtype: str) -> jax.lax.Precision | None:
    # A TPU multiplies float32 matrices in bfloat16 unless told otherwise; who asks for float32 means it.
    return jax.lax.Precision.HIGHEST if compute_dtype == "float32" else None


def _plus(x: jax.Array, bias: jax.Array) -> jax.Array:
    """In float32, and so is the sum over tokens that is the bias's gradient; returned in the dtype of x."""
    return (x.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * weight, in float32, returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * weight.astype(jnp.float32)).astype(x.dtype)


def _rotate(x_BQAH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) in the half-split layout of the Hugging Face models, in float32."""
    if x_BQAH.dtype != jnp.bfloat16:
        a, b = jnp.split(x_BQAH, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    # A product with a permutation is exact, and costs a TPU less than moving halves of its 128 lanes.
    halves = jnp.roll(jnp.eye(x_BQAH.shape[-1], dtype=x_BQAH.dtype), x_BQAH.shape[-1] // 2, axis=1)
    swapped = jnp.einsum("bqah,hi->bqai", x_BQAH, halves, preferred_element_type=jnp.float32)
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    return (x_BQAH.astype(jnp.float32) * cos + swapped * sin).astype(x_BQAH.dtype)


def _write(cache_ZBSKH: jax.Array, x_B1KH: jax.Array, layer: jax.Array, slot: jax.Array) -> jax.Array:
    start = (layer, jnp.zeros_like(slot), slot, jnp.zeros_like(slot), jnp.zeros_like(slot))
    return jax.lax.dynamic_update_slice(cache_ZBSKH, x_B1KH[None].astype(cache_ZBSKH.dtype), start)


def abstract_policy(config: DecoderConfig) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """The graph definition, and the parameters as `ShapeDtypeStruct`s with their shardings. Allocates nothing."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))), nnx.Param)[:2]
    if config.mesh is None:
        return graph, shapes
    return graph, jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, param_shardings(shapes, config.mesh)
    )


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The sharding of each parameter, or of each optimizer moment of one, from its axes. Scalars are not split."""

    def look_up(path: tuple[Any, ...], x: Any) -> NamedSharding:
        return sharding(mesh, *PARAMS[param_name(path)].logical_axes) if x.ndim else sharding(mesh)

    return jax.tree_util.tree_map_with_path(look_up, params)


def init_policy(config: DecoderConfig, key: jax.Array) -> nnx.State:
    """Random parameters, made on the mesh in their shards: normal with variance 1 / fan-in, norms 1, biases 0."""

    def init(key: jax.Array) -> nnx.State:
        return nnx.state(Decoder(config, nnx.Rngs(params=key)), nnx.Param)

    where = None if config.mesh is None else param_shardings(abstract_policy(config)[1], config.mesh)
    return jax.jit(init, out_shardings=where)(key)
