"""The text that is graded."""

from collections.abc import Sequence

import numpy as np
import pytest

from dynamo_jax.batch import Rollouts
from dynamo_jax.rollout.text import decode_rollouts, some_texts
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer

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


@pytest.mark.parametrize(("count", "rows"), [(0, []), (1, [0]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, range(5))])
def test_some_are_evenly_spaced(count: int, rows: Sequence[int]) -> None:
    batch = rollouts(*(([*TOKENIZER.encode(str(i)), EOS], True) for i in range(5)))
    found, texts = some_texts(batch, count, TOKENIZER)
    assert found.tolist() == list(rows)
    assert texts == [str(i) for i in rows]
