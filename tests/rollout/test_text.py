"""The text that is graded."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest

from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.config import ArchitectureConfig, MeshConfig
from dynamo_jax.policy import DecoderConfig, abstract_policy, init_policy
from dynamo_jax.rollout.sampler import Sampler, SamplerConfig
from dynamo_jax.rollout.text import decode_rollouts, some_texts
from dynamo_jax.sharding import make_mesh
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, grade
from dynamo_jax.tasks.tokenizer import UNKNOWN_ID

TOKENIZER = ArithmeticTokenizer()
EOS = TOKENIZER.eos_id


class TwoStops(ArithmeticTokenizer):
    """A chat model ends with its end of turn as often as with its end of sequence; both stop, neither is text."""

    def __init__(self) -> None:
        super().__init__(stop_ids=(1, 5))

    def decode(self, ids):
        return ",".join(map(str, ids))


def rollouts(*rows: tuple[list[int], bool], width: int = 4) -> Rollouts:
    tokens = np.full((len(rows), width), TOKENIZER.pad_id, np.int32)
    for row, (ids, _) in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids, _ in rows], np.int32)
    ended = np.array([ended for _, ended in rows])
    return Rollouts(tokens, lengths, ended, np.zeros(tokens.shape, np.float32))


def test_an_ended_rollout_loses_its_end_and_its_padding():
    assert decode_rollouts(rollouts(([*TOKENIZER.encode("74"), EOS], True)), TOKENIZER) == ["74"]


def test_an_end_in_the_first_position_is_an_empty_text():
    assert decode_rollouts(rollouts(([EOS], True)), TOKENIZER) == [""]


def test_a_truncated_rollout_keeps_all_of_its_text():
    assert decode_rollouts(rollouts((TOKENIZER.encode("7412"), False)), TOKENIZER) == ["7412"]


def test_an_end_in_the_last_position_is_not_a_truncation():
    assert decode_rollouts(rollouts(([*TOKENIZER.encode("741"), EOS], True)), TOKENIZER) == ["741"]


def test_every_stop_token_is_left_out_and_only_at_the_end():
    batch = rollouts(([7, 5], True), ([7, 1], True), ([5, 7, 1], True), ([7, 8, 9, 5], False))
    assert decode_rollouts(batch, TwoStops()) == ["7", "7", "5,7", "7,8,9,5"]


def test_padding_after_the_length_never_shows():
    batch = rollouts(([7, 1], True))
    batch.tokens_BC[0, 2:] = 9  # whatever the sampler's buffer holds there
    assert decode_rollouts(batch, TwoStops()) == ["7"]


def test_ids_without_a_token_are_sampled_and_show():
    """A policy of 64 ids, a tokenizer of 16: what is drawn follows the policy, and no id vanishes from the text."""
    shape = ArchitectureConfig(
        hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=8, vocab_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    policy = DecoderConfig(shape)
    settings = SamplerConfig(max_tokens=4, batch=256, window=1, stop_ids=TOKENIZER.stop_ids, pad_id=TOKENIZER.pad_id)
    sampler = Sampler(abstract_policy(policy)[0], settings, make_mesh(MeshConfig(), jax.devices()[:1]))
    tokens = np.array([TOKENIZER.encode("3+4")], np.int32)
    prompts = PromptBatch(np.zeros(1, np.int32), tokens, np.array([3], np.int32), ("p",), ("3+4",), ("7",))
    drawn = sampler.sample(init_policy(policy, jax.random.key(0)), prompts, np.zeros(256, int), jax.random.key(1))
    first = drawn.tokens_BC[:, 0]
    assert 0.5 < np.mean(first >= TOKENIZER.size) < 0.95  # three quarters of the ids
    assert np.isfinite(drawn.logp_BC).all()

    texts = decode_rollouts(drawn, TOKENIZER)
    sampled = np.arange(4) < drawn.length_B[:, None]
    unknown = ((drawn.tokens_BC >= TOKENIZER.size) & sampled).sum(axis=1)
    assert [text.count(UNKNOWN_ID) for text in texts] == unknown.tolist()


def test_an_answer_is_not_read_across_an_id_without_a_token():
    [text] = decode_rollouts(rollouts(([*TOKENIZER.encode("7"), 40, *TOKENIZER.encode("4"), EOS], True)), TOKENIZER)
    assert text == f"7{UNKNOWN_ID}4"
    assert not grade(text, "74")


@pytest.mark.parametrize(("count", "rows"), [(0, []), (1, [0]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, range(5))])
def test_some_are_evenly_spaced(count: int, rows: Sequence[int]) -> None:
    batch = rollouts(*(([*TOKENIZER.encode(str(i)), EOS], True) for i in range(5)))
    found, texts = some_texts(batch, count, TOKENIZER)
    assert found.tolist() == list(rows)
    assert texts == [str(i) for i in rows]
