"""Generation: log-probabilities, ends, distribution, and that only prompt, index and key decide a rollout."""

import dataclasses
import itertools
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.config import ArchitectureConfig, MeshConfig
from dynamo_jax.config.checks import COLDEST
from dynamo_jax.policy import DecoderConfig, abstract_policy
from dynamo_jax.rollout.filters import EXCLUDED, filter_logits
from dynamo_jax.rollout.sampler import Sampler, SamplerConfig, _sample_token, generate, join, window_size
from dynamo_jax.sharding import make_mesh

V, L, C = 24, 5, 6
POLICY = DecoderConfig(
    ArchitectureConfig(
        hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=24, vocab_size=V,
        tie_word_embeddings=False,  # a tied head prefers to repeat itself, and greedy completions would be all alike
    )
)  # fmt: skip
BASE = SamplerConfig(max_tokens=C, batch=8, window=4, stop_ids=(3, 7), pad_id=0)
GREEDY = dataclasses.replace(BASE, temperature=0.0, stop_ids=())
COUNTS = np.array([7, 1, 2, 9, 4, 3])  # rollouts of each of the six prompts
KEY = jax.random.key(11)


@cache
def params() -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape), x.dtype), abstract_policy(POLICY)[1])


@cache
def sampler(config: SamplerConfig, sharded: bool = False) -> Sampler:
    size = MeshConfig(data=2, fsdp=2, tensor=2) if sharded else MeshConfig()
    mesh = make_mesh(size, jax.devices()[: size.size])
    policy = dataclasses.replace(POLICY, mesh=mesh if sharded else None)
    return Sampler(abstract_policy(policy)[0], config, mesh)


def prompt_batch(slots: Any = slice(None)) -> PromptBatch:
    """Six prompts of different lengths, left-padded with a real token's id; or some of them."""
    length = np.array([5, 2, 3, 1, 4, 5], np.int32)
    tokens = np.random.default_rng(5).integers(0, V, (6, L)).astype(np.int32)
    tokens = np.where(np.arange(L) >= L - length[:, None], tokens, 3)
    names = tuple(str(i) for i in np.arange(6)[slots])
    return PromptBatch(np.arange(6, dtype=np.int32)[slots], tokens[slots], length[slots], names, names, names)


def sample(config: SamplerConfig = BASE, counts: np.ndarray = COUNTS, sharded: bool = False) -> Rollouts:
    return sampler(config, sharded).sample(params(), prompt_batch(), np.repeat(np.arange(6), counts), KEY)


@cache
def compiled_logits() -> Any:
    def run(params: Any, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        model = nnx.merge(abstract_policy(POLICY)[0], params)
        return jax.vmap(model.logits)(model(tokens, valid))

    return jax.jit(run)


def teacher_forced(rollouts: Rollouts, prompt_of: np.ndarray) -> np.ndarray:
    """Logits [B, C, V] that each completion token was drawn from, by one forward pass over prompt and completion."""
    prompts = prompt_batch()
    real = np.arange(C) < rollouts.length_B[:, None]
    valid = np.concatenate([np.arange(L) >= L - prompts.length_P[prompt_of, None], real], axis=1)
    tokens = np.concatenate([prompts.tokens_PL[prompt_of], rollouts.tokens_BC], axis=1)
    return np.asarray(compiled_logits()(params(), tokens, valid))[:, L - 1 : -1]


def assert_same(a: Rollouts, b: Rollouts) -> None:
    for name in ("tokens_BC", "length_B", "ended_B"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_allclose(a.logp_BC, b.logp_BC, atol=1e-5)


def assert_consistent(r: Rollouts, stop_ids: tuple[int, ...], pad_id: int) -> None:
    """Lengths, ends and padding tell one story, row by row."""
    for tokens, length, ended, logp in zip(r.tokens_BC, r.length_B, r.ended_B, r.logp_BC, strict=True):
        stops = np.flatnonzero(np.isin(tokens[:length], stop_ids))
        assert length == (stops[0] + 1 if ended else C)
        assert len(stops) == int(ended)
        assert (tokens[length:] == pad_id).all()
        assert (logp[length:] == 0).all()
        assert (logp[:length] < 0).all()


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.05}],
    ids=["plain", "tempered", "filtered"],
)
def test_logp_equals_a_recompute(settings: dict[str, float]) -> None:
    config = dataclasses.replace(BASE, **settings)
    rollouts = sample(config)
    assert_consistent(rollouts, config.stop_ids, config.pad_id)
    logits = teacher_forced(rollouts, np.repeat(np.arange(6), COUNTS)) / config.temperature
    logp = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), rollouts.tokens_BC[..., None], axis=2)[..., 0]
    real = np.arange(C) < rollouts.length_B[:, None]
    assert real.sum() > 60
    np.testing.assert_allclose(rollouts.logp_BC[real], logp[real], atol=1e-4, rtol=0)
    allowed = filter_logits(
        jnp.asarray(logits.reshape(-1, V)), top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
    ).reshape(logits.shape)
    drawn = np.take_along_axis(np.asarray(allowed), rollouts.tokens_BC[..., None], axis=2)[..., 0]
    assert (drawn[real] > EXCLUDED).all()


def test_an_end_in_the_first_position_and_no_end_at_all() -> None:
    many = 10 * COUNTS
    at_once = sample(dataclasses.replace(BASE, stop_ids=tuple(range(V))), many)
    assert (at_once.length_B == 1).all()
    assert at_once.ended_B.all()
    never = sample(dataclasses.replace(BASE, stop_ids=()), many)
    assert (never.length_B == C).all()
    assert not never.ended_B.any()
    for r, stops in ((at_once, tuple(range(V))), (never, ())):
        assert_consistent(r, stops, 0)
    np.testing.assert_array_equal(at_once.tokens_BC[:, 0], never.tokens_BC[:, 0])

    mixed = sample(counts=many)
    assert_consistent(mixed, BASE.stop_ids, BASE.pad_id)
    assert set(mixed.length_B) >= {1, 2, C}
    assert {bool(e) for e in mixed.ended_B[mixed.length_B == C]} == {True, False}  # stopped by the last token, or cut
    # Stopping cuts a rollout and changes nothing before the cut.
    real = np.arange(C) < mixed.length_B[:, None]
    np.testing.assert_array_equal(mixed.tokens_BC[real], never.tokens_BC[real])


def test_padding_with_the_stop_token_is_not_an_end() -> None:
    padded = sample(dataclasses.replace(BASE, pad_id=7))
    plain = sample()
    np.testing.assert_array_equal(padded.length_B, plain.length_B)
    np.testing.assert_array_equal(padded.ended_B, plain.ended_B)
    assert_consistent(padded, BASE.stop_ids, 7)


@pytest.mark.parametrize(("batch", "window", "sharded"), [(32, 6, False), (26, 3, False), (16, 8, True)])
def test_batch_split_window_and_mesh_do_not_matter(batch: int, window: int, sharded: bool) -> None:
    assert_same(sample(dataclasses.replace(BASE, batch=batch, window=window), sharded=sharded), sample())


def test_the_rest_of_what_was_begun_before() -> None:
    """The rollouts of the last three prompts alone, told the index of the first of them."""
    first, prompts = int(COUNTS[:3].sum()), prompt_batch(slice(3, None))
    pieces = sampler(BASE).pieces(params(), prompts, np.repeat(np.arange(3), COUNTS[3:]), KEY, first=first)
    assert_same(join(list(pieces)), jax.tree.map(lambda x: x[first:], sample()))


def test_slot_and_neighbours_do_not_matter() -> None:
    prompts, prompt_of = prompt_batch(), np.repeat(np.arange(6), COUNTS)
    index = np.arange(len(prompt_of))
    graph = abstract_policy(POLICY)[0]
    run = jax.jit(lambda p, *args: generate(nnx.merge(graph, p), *args, KEY, BASE))
    first = run(params(), prompts.tokens_PL, prompts.length_P, prompt_of, index)
    assert_same(first, sample())

    rng = np.random.default_rng(0)
    slot_of, order = rng.permutation(6), rng.permutation(len(prompt_of))  # prompts move, rollouts move
    moved = prompt_batch(np.argsort(slot_of))
    second = run(params(), moved.tokens_PL, moved.length_P, slot_of[prompt_of][order], index[order])
    assert_same(second, jax.tree.map(lambda x: x[order], first))


def test_indices_and_keys_make_rollouts_differ() -> None:
    rollouts = sample(counts=np.array([0, 0, 0, 0, 0, 16]))
    assert len({tuple(tokens) for tokens in rollouts.tokens_BC}) > 12
    other = sampler(BASE).sample(params(), prompt_batch(), np.full(16, 5), jax.random.key(12))
    assert (other.tokens_BC != rollouts.tokens_BC).any(axis=1).mean() > 0.8


def test_unequal_groups_belong_to_their_prompts() -> None:
    prompt_of = np.repeat(np.arange(6), COUNTS)
    rollouts = sample(GREEDY)
    alone = [sampler(GREEDY).sample(params(), prompt_batch([p]), np.zeros(1, int), KEY).tokens_BC[0] for p in range(6)]
    assert len({tuple(tokens) for tokens in alone}) == 6  # so that a swapped prompt would be seen
    np.testing.assert_array_equal(rollouts.tokens_BC, np.stack(alone)[prompt_of])


def test_greedy_is_the_argmax_at_every_token() -> None:
    """By induction the loop of argmax, forward pass, argmax, ...: each token is that of all those before it."""
    prompt_of = np.repeat(np.arange(6), COUNTS)
    rollouts = sample(GREEDY)
    assert_consistent(rollouts, GREEDY.stop_ids, GREEDY.pad_id)
    logits = teacher_forced(rollouts, prompt_of)
    np.testing.assert_array_equal(rollouts.tokens_BC, logits.argmax(axis=2))
    # Log-probabilities are those at temperature 1, at which no token is certain.
    logp = np.asarray(jax.nn.log_softmax(logits)).max(axis=2)
    np.testing.assert_allclose(rollouts.logp_BC, logp, atol=1e-4, rtol=0)
    assert rollouts.logp_BC.max() < -1e-3
    # One response a prompt, whatever the index and the key.
    assert len({(p, *tokens) for p, tokens in zip(prompt_of, rollouts.tokens_BC, strict=True)}) == 6
    other = sampler(GREEDY).sample(params(), prompt_batch(), prompt_of, jax.random.key(12))
    np.testing.assert_array_equal(other.tokens_BC, rollouts.tokens_BC)
    np.testing.assert_array_equal(other.logp_BC, rollouts.logp_BC)
    # A response ends at its stop token and is the same before it, with a filter and on eight devices, too.
    stop = int(rollouts.tokens_BC[0, 2])
    ending = dataclasses.replace(GREEDY, stop_ids=(stop,), top_p=0.3, top_k=2, min_p=0.9, window=8)
    ended = sample(ending, sharded=True)
    assert_consistent(ended, ending.stop_ids, ending.pad_id)
    assert ended.ended_B[0]
    real = np.arange(C) < ended.length_B[:, None]
    np.testing.assert_array_equal(ended.tokens_BC[real], rollouts.tokens_BC[real])
    np.testing.assert_allclose(ended.logp_BC[real], rollouts.logp_BC[real], atol=1e-5)
    assert sampler(GREEDY).traces == sampler(ending, True).traces == 1


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.1}, {"top_k": 1}, {"top_p": 1e-6, "min_p": 1.0, "top_k": 3}])
@pytest.mark.parametrize("temperature", [0.0, -0.0, 0])
def test_greedy_ties_go_to_the_smaller_id(filters: dict[str, float], temperature: float) -> None:
    rows = [[0, 2, 2, 1], [3, 3, 3, 3], [-1e30, -5, -6, -5], [0, 0, 1e30, 1e30], [-np.inf, 7, -np.inf, 7], [0, 1, 2, 3]]
    config = dataclasses.replace(GREEDY, temperature=temperature, **filters)
    keys = jax.random.split(KEY, len(rows))
    token, logp = _sample_token(jnp.asarray(rows, jnp.float32), keys, jnp.int32(0), config)
    np.testing.assert_array_equal(token, [1, 0, 1, 2, 1, 3])
    assert token.dtype == jnp.int32
    assert np.isfinite(logp).all()
    np.testing.assert_allclose(logp[:2], [-np.log(2 + np.exp(-2) + np.exp(-1)), -np.log(4)], rtol=1e-6)


def test_the_coldest_temperature_is_still_a_division() -> None:
    config = dataclasses.replace(GREEDY, temperature=COLDEST, top_p=0.9)
    logits = jnp.asarray([[1, 5, 3, -2], [-1e3, 9e2, 1e3, 0]], jnp.float32)
    token, logp = _sample_token(logits, jax.random.split(KEY, 2), jnp.int32(0), config)
    np.testing.assert_array_equal(token, [1, 2])
    assert not np.isnan(logp).any()


def test_one_trace_serves_every_allocation() -> None:
    one = Sampler(abstract_policy(POLICY)[0], BASE, make_mesh(MeshConfig(), jax.devices()[:1]))
    rng = np.random.default_rng(0)
    for size in (40, 26, 8, 3, 1):
        counts = rng.multinomial(size, np.full(6, 1 / 6))
        rollouts = one.sample(params(), prompt_batch(), np.repeat(np.arange(6), counts), KEY)
        assert rollouts.tokens_BC.shape == (size, C)
        assert isinstance(rollouts.tokens_BC, np.ndarray)
        assert (rollouts.tokens_BC.dtype, rollouts.logp_BC.dtype) == (np.int32, np.float32)
        assert_consistent(rollouts, BASE.stop_ids, BASE.pad_id)
    some = one.sample(params(), prompt_batch([4, 1]), np.array([0, 1, 1]), KEY)  # fewer prompts than the window
    assert some.length_B.shape == (3,)
    assert one.traces == 1


def test_fewer_rollouts_than_a_batch() -> None:
    everything = sample()
    for size in (1, 5, 11):
        part = sampler(BASE).sample(params(), prompt_batch(), np.repeat(np.arange(6), COUNTS)[:size], KEY)
        assert_same(part, jax.tree.map(lambda x, n=size: x[:n], everything))


def test_window_size_is_enough_and_not_too_much() -> None:
    for batch, prompts, low in itertools.product(range(1, 8), range(1, 6), range(1, 4)):
        most = 0
        for counts in itertools.product(range(low, low + 3), repeat=prompts):
            prompt_of = np.repeat(np.arange(prompts), counts)
            starts = range(max(1, len(prompt_of) - batch + 1))
            most = max(most, *(len(set(prompt_of[s : s + batch].tolist())) for s in starts))
        if batch <= prompts * (low + 2):
            bound = window_size(batch, prompts, low, 1)
            assert most <= bound <= most + 1, (batch, prompts, low)
            for shards in (2, 3, 4):
                assert window_size(batch, prompts, low, shards) in range(bound, bound + shards)
                assert window_size(batch, prompts, low, shards) % shards == 0


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02}])
def test_frequencies_follow_the_softmax(settings: dict[str, float]) -> None:
    config = SamplerConfig(max_tokens=2, batch=4096, window=1, stop_ids=(), pad_id=0, **settings)
    prompts = prompt_batch([2])
    tokens = sampler(config).sample(params(), prompts, np.zeros(4096, int), KEY).tokens_BC
    favourite = np.bincount(tokens[:, 0]).argmax()

    def p_value(drawn: np.ndarray, context: np.ndarray) -> float:
        """Of Pearson's chi-square test; rare tokens share one bin."""
        logits = compiled_logits()(params(), context[None], np.ones((1, len(context)), bool))[:, -1]
        allowed = filter_logits(logits / config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)
        expected = np.asarray(jax.nn.softmax(allowed[0]), np.float64) * len(drawn)
        seen = np.bincount(drawn, minlength=V)
        assert not seen[expected == 0].any()
        common = expected >= 5
        table = [np.append(x[common], x[~common].sum()) for x in (seen, expected)]
        seen, expected = (x[table[1] > 0] for x in table)
        return float(scipy.stats.chisquare(seen, expected * seen.sum() / expected.sum()).pvalue)

    context = prompts.tokens_PL[0, L - prompts.length_P[0] :]
    assert p_value(tokens[:, 0], context) > 0.01
    # The second token, given the first: its noise must not depend on the first one's.
    assert p_value(tokens[tokens[:, 0] == favourite, 1], np.append(context, favourite).astype(np.int32)) > 0.01
