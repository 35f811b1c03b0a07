"""Drawing and grading piece by piece: what is held, what is kept, what can end it."""

import weakref
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.evaluation.draw import answered, content_key
from dynamo_jax.evaluation.scores import evaluate
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, ArithmeticVerifier
from dynamo_jax.tasks.prompts import PromptSet, make_prompt_set

TOKENIZER = ArithmeticTokenizer()
SAMPLES, PIECE = 4, 3
EOS = TOKENIZER.stop_ids[0]


def problems(name: str = "bench", count: int = 5, answer: str = "3") -> PromptSet:
    texts = [f"{i}+2=" for i in range(1, count + 1)]
    return make_prompt_set(name, [(text, text, answer, TOKENIZER.encode(text)) for text in texts])


class Digits:
    """A sampler whose i-th rollout is the digits of i, ended where i is even; it knows which of its arrays are held."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[np.ndarray]] = []
        self.most = 0

    def pieces(
        self, params: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, key: jax.Array, *, first: int = 0
    ) -> Iterator[Rollouts]:
        for start in range(0, len(prompt_of_B), PIECE):
            index = first + np.arange(start, min(start + PIECE, len(prompt_of_B)))
            tokens = np.array([[*TOKENIZER.encode(f"{i:02d}"), EOS if i % 2 == 0 else 0] for i in index], np.int32)
            logp = np.zeros(tokens.shape, np.float32)
            ended = index % 2 == 0
            self.made += [weakref.ref(tokens), weakref.ref(logp)]
            self.most = max(self.most, sum(made() is not None for made in self.made) // 2)
            yield Rollouts(tokens, 2 + ended.astype(np.int32), ended, logp)
            del tokens, logp


def run(sampler: Digits, prompts: PromptSet, **options: Any) -> Any:
    return evaluate(
        sampler, None, prompts, SAMPLES, jax.random.key(0), TOKENIZER, ArithmeticVerifier(), 8, **options  # type: ignore[arg-type]
    )  # fmt: skip


def test_every_sample_is_graded_in_its_place():
    evaluation = run(Digits(), problems(answer="07"))
    assert evaluation.ids == tuple(f"{i}+2=" for i in range(1, 6))
    assert np.argwhere(evaluation.correct).tolist() == [[1, 3]]  # the 7th rollout
    assert evaluation.length.tolist() == [[3, 2, 3, 2]] * 5
    assert evaluation.truncated.tolist() == [[False, True, False, True]] * 5
    assert evaluation.no_answer.shape == (5, SAMPLES)


def test_an_answer_inside_the_thinking_that_the_prompt_opened_is_none():
    plain = problems()
    rows = [(p.id, p.text + "<think>\n", p.answer, p.tokens) for p in plain.prompts]
    opened = make_prompt_set("bench", rows)
    texts = [r"maybe \boxed{5}? wait", r"maybe 4</think>\boxed{5}", "5</think>", r"<think>no</think> \boxed{5}"]
    assert answered(plain, texts) == [True, True, False, True]
    assert answered(opened, texts) == [False, True, False, True]
    mixed = make_prompt_set("bench", [*rows[:1], *((p.id, p.text, p.answer, p.tokens) for p in plain.prompts[1:])])
    assert answered(mixed, texts) == [True, True, False, True]  # some responses would never be right otherwise
    assert run(Digits(), plain).no_answer.sum() == 0
    assert run(Digits(), opened).no_answer.all()  # numbers without an end of the thinking


def test_problems_that_are_too_long_count_in_training_too():
    prompts = problems(answer="07")
    rows = [(p.id, p.text, p.answer, p.tokens) for p in prompts.prompts]
    evaluation = run(Digits(), make_prompt_set("bench", rows, dropped_ids=["long"]))
    assert evaluation.pass_at(1)[0] == pytest.approx(1 / (SAMPLES * 6))
    assert evaluation.metrics([1])["eval/bench/dropped"] == 1


def test_no_more_than_three_pieces_are_held():
    sampler = Digits()
    run(sampler, problems(count=9))
    assert len(sampler.made) == 2 * 12
    assert sampler.most <= 3


def test_what_is_called_after_each_piece_may_end_it():
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    sampler = Digits()
    with pytest.raises(KeyboardInterrupt):
        run(sampler, problems(count=9), each_piece=stop)
    assert len(sampler.made) == 2 * 3
    calls.clear()
    run(Digits(), problems(count=1), each_piece=lambda: calls.append(1))
    assert len(calls) == 2  # 4 samples, 3 a piece


def test_the_key_depends_on_the_content():
    def data(prompts: PromptSet, seed: int = 0) -> list[int]:
        return jax.random.key_data(content_key(jax.random.key(seed), prompts)).tolist()

    assert data(problems("one")) == data(problems("other"))
    different = [data(problems()), data(problems(count=4)), data(problems(answer="4")), data(problems(), seed=1)]
    assert len(set(map(tuple, different))) == 4
