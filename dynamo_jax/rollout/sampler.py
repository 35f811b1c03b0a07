"""On-device generation: prefill each prompt once, share its cache among its rollouts, decode until all have ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.policy.model import Decoder, KVCache
from dynamo_jax.rollout.filters import filter_logits
from dynamo_jax.sharding import sharding, to_host, to_mesh


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """All that is static about sampling.

    `batch` rollouts are decoded at once, from at most `window` prompts; both are fixed, so that one compiled program
    serves every allocation, and evaluation too.
    """

    max_tokens: int
    batch: int
    window: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0  # 0: greedy, the most likely token, whatever the filters below
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def window_size(batch: int, prompts: int, smallest_group: int, shards: int) -> int:
    """Prompts that `batch` consecutive rollouts can touch, rounded up to what the mesh divides.

    The first and the last group may be cut, all others have at least `smallest_group` rollouts.
    """
    touched = min(prompts, 2 + max(batch - 2, 0) // smallest_group)
    return -(-touched // shards) * shards


class _State(NamedTuple):
    step: jax.Array
    cache: KVCache
    rollouts: Rollouts


def generate(
    model: Decoder,
    prompt_tokens_PL: jax.Array,
    prompt_length_P: jax.Array,
    prompt_of_B: jax.Array,
    rollout_index_B: jax.Array,
    key: jax.Array,
    config: SamplerConfig,
) -> Rollouts:
    """Sample one completion for each entry of `prompt_of_B`. Pure; jit with `model` as a pytree and `config` static.

    The t-th token of a rollout is drawn with `fold_in(fold_in(key, rollout_index), t)`, so that it depends on the
    parameters, the prompt and its index alone: not on its slot, on its neighbours or on the number of devices.

    Args:
        prompt_tokens_PL: int32, left-padded. prompt_length_P: int32, real tokens.
        prompt_of_B: int32, the slot of each rollout's prompt. rollout_index_B: int32, its index within the step.
        key: typed random key.

    Returns: `Rollouts`; `logp_BC` is under softmax(logits / temperature) before top-k, top-p and min-p.
    At temperature 0 each token is the most likely one, of equally likely ones the lowest id, and `logp_BC` is under
    softmax(logits).
    """
    L, C = prompt_tokens_PL.shape[1], config.max_tokens
    keys_B = jax.vmap(partial(jax.random.fold_in, key))(rollout_index_B)

    valid_PL = jnp.arange(L) >= L - prompt_length_P[:, None]
    hidden_PLD, prompt_cache = model.prefill(prompt_tokens_PL, valid_PL)
    # One gather after prefill: a prompt is computed once, however many rollouts it was given.
    room = [(0, 0), (0, 0), (0, C), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x[:, prompt_of_B], room), prompt_cache)
    length_B = prompt_length_P[prompt_of_B]
    valid_BL = valid_PL[prompt_of_B]

    def draw(logits_BV: jax.Array, step: jax.Array, r: Rollouts) -> Rollouts:
        token_B, logp_B = _sample_token(logits_BV, keys_B, step, config)
        live_B = ~r.ended_B
        stop_B = jnp.isin(token_B, jnp.asarray(config.stop_ids, jnp.int32))
        return Rollouts(
            tokens_BC=r.tokens_BC.at[:, step].set(jnp.where(live_B, token_B, config.pad_id)),
            length_B=r.length_B + live_B,
            ended_B=r.ended_B | stop_B,
            logp_BC=r.logp_BC.at[:, step].set(jnp.where(live_B, logp_B, 0.0)),
        )

    def decode(state: _State) -> _State:
        step, cache, r = state  # token `step` is drawn from the hidden state of token `step - 1`
        slot = L + step - 1
        completion_BC = jnp.broadcast_to(jnp.arange(C) < step, r.tokens_BC.shape)
        valid_BS = jnp.concatenate([valid_BL, completion_BC], axis=1)
        token_B = jax.lax.dynamic_index_in_dim(r.tokens_BC, step - 1, axis=1, keepdims=False)
        hidden_BD, cache = model.decode(token_B, length_B + step - 1, slot, valid_BS, cache)
        return _State(step + 1, cache, draw(model.logits(hidden_BD), step, r))

    B = prompt_of_B.shape[0]
    empty = Rollouts(
        jnp.full((B, C), config.pad_id, jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool), jnp.zeros((B, C))
    )
    first = draw(model.logits(hidden_PLD[:, -1])[prompt_of_B], jnp.int32(0), empty)
    state = _State(jnp.int32(1), cache, first)
    return jax.lax.while_loop(lambda s: (s.step < C) & ~jnp.all(s.rollouts.ended_B), decode, state).rollouts


def _sample_token(
    logits_BV: jax.Array, keys_B: jax.Array, step: jax.Array, config: SamplerConfig
) -> tuple[jax.Array, jax.Array]:
    """Gumbel-max sampling: the token (int32 [B]) and its unfiltered log-probability (float32 [B], nats)."""
    noisy_BV = logits_BV
    if config.temperature > 0:
        logits_BV = logits_BV / config.temperature
        allowed_BV = filter_logits(logits_BV, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        step_keys_B = jax.vmap(partial(jax.random.fold_in, data=step))(keys_B)
        gumbel_BV = jax.vmap(lambda k: jax.random.gumbel(k, logits_BV.shape[1:], jnp.float32))(step_keys_B)
        noisy_BV = allowed_BV + gumbel_BV
    token_B = jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)
    logp_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


class Sampler:
    """The compiled generator and the host side of it: rollouts go through in pieces of `config.batch`."""

    def __init__(self, graph: nnx.GraphDef[Decoder], config: SamplerConfig, mesh: Mesh) -> None:
        self.config = config
        self.traces = 0
        self._mesh = mesh

        def program(params: Any, tokens: Any, lengths: Any, prompt_of: Any, index: Any, key: Any) -> Rollouts:
            self.traces += 1  # runs once a trace, not once a call
            return generate(nnx.merge(graph, params), tokens, lengths, prompt_of, index, key, config)

        rows = sharding(mesh, "batch")
        one = sharding(mesh)
        self._inputs = (rows, rows, rows, rows, one)
        self.program: Callable[..., Rollouts] = jax.jit(program, out_shardings=rows)

    def sample(self, params: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, key: jax.Array) -> Rollouts:
        """`pieces` in one."""
        return join(list(self.pieces(params, prompts, prompt_of_B, key)))

    def pieces(
        self, params: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, key: jax.Array, *, first: int = 0
    ) -> Iterator[Rollouts]:
        """Any number of rollouts, as host arrays, each piece as soon as it is done, while the device makes the next.

        `prompt_of_B`, nondecreasing, has the slot in `prompts` of each. `first` is the index of the first of them, for
        the rest of what was begun before.

        A piece ends when it has `config.batch` rollouts or `config.window` prompts; what is missing to a full piece is
        filled with copies of its last rollout, whose results are dropped.
        """
        started = self._started(params, prompts, prompt_of_B, key, first)
        ahead = next(started, None)
        while ahead is not None:
            out, size = ahead
            ahead = next(started, None)  # queued before the host waits; no more, so that a stop need not wait for all
            yield jax.tree.map(lambda x, n=size: x[:n], to_host(out))

    def _started(
        self, params: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, key: jax.Array, first: int
    ) -> Iterator[tuple[Rollouts, int]]:
        """Each piece as it is given to the device, and how many of its rows count."""
        start = 0
        while start < len(prompt_of_B):
            rows_b = prompt_of_B[start : start + self.config.batch]
            slots = np.unique(rows_b)[: self.config.window]
            rows_b = rows_b[rows_b <= slots[-1]]
            local_b = np.searchsorted(slots, rows_b)
            index_b = first + start + np.arange(len(rows_b))
            arrays = (
                prompts.tokens_PL[_fill(slots, self.config.window)],
                prompts.length_P[_fill(slots, self.config.window)],
                _fill(local_b, self.config.batch),
                _fill(index_b, self.config.batch),
                np.asarray(jax.random.key_data(key)),
            )
            *inputs, key_data = to_mesh(arrays, self._inputs)
            key_there = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(key))
            yield self.program(params, *inputs, key_there), len(rows_b)
            start += len(rows_b)


def join(pieces: list[Rollouts]) -> Rollouts:
    """Rollouts of several pieces, or rounds, as one. Host arrays."""
    joined: Rollouts = jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)
    return joined


def _fill(x: np.ndarray, size: int) -> np.ndarray:
    """`x` as int32, its last entry repeated up to `size` entries."""
    return np.pad(x.astype(np.int32), (0, size - len(x)), mode="edge")
