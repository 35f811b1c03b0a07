"""Every rollout's id, answer, reward and advantage belong to the prompt it was sampled from, all the way to the update.

The sampler is replaced by one that writes, for each rollout, the worked solution of the prompt it was given or that of
another prompt. All solutions are different, so whatever is read through a wrong index anywhere in the loop is seen: a
right answer graded against another prompt's is wrong. Prompts differ in how often they are right, so groups become
unequal; epochs do not end with a step, so a step may hold a prompt twice; and the run is resumed in the middle.
"""

import dataclasses
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from dynamo_jax import trainer as loop
from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.config import load_config
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, ArithmeticVerifier, solve, split_problems
from dynamo_jax.tasks.prompts import make_prompt_set
from dynamo_jax.tasks.task import Task

STEPS, RESUMED_AFTER, P, N, C = 7, 3, 8, 20, 5
CONFIG = {
    "run_dir": "unused",
    "task": {"max_prompt_tokens": 8, "arithmetic": {"max_operations": 3}},
    "policy": {
        "architecture": {
            "hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "intermediate_size": 8,
        }
    },
    "rollout": {"prompts": P, "per_prompt": 5, "max_tokens": C},
    "allocation": {"low": 2, "high": 12, "half_life": 1e6},
    "trainer": {"steps": STEPS, "mini_batch": 10, "micro_batch": 5},
    "eval": {"every": 2, "samples": 2, "k": [1]},
    "checkpoint": {"every": 2},
    "logging": {"tensorboard": False, "progress": False, "rollouts_per_step": P * 5},
}  # fmt: skip
TOKENIZER = ArithmeticTokenizer()


def problems() -> list[str]:
    """N of three operations, no two with the same worked solution."""
    by_solution = {solve(p): p for p in split_problems(0, 400, 1, max_operations=3)[0] if len(p) == 8}
    return list(by_solution.values())[:N]


def checksum(*parts: Any) -> int:
    return zlib.crc32("|".join(map(str, parts)).encode())


def logp_of(problem: str, text: str) -> float:
    """A mark that says which prompt and which completion a row of log-probabilities belongs to."""
    return -(checksum(problem, text) % 1000) / 100


class Echo:
    """Answers prompts by their tokens, in order: always right, always wrong, or in turns. Keeps what it was asked."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[int, str, str]]] = []  # (slot, problem, text) of each rollout
        self.traces = 0

    def pieces(self, _: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, __: Any) -> Iterator[Rollouts]:
        yield self.sample(_, prompts, prompt_of_B, __)

    def sample(self, _: Any, prompts: PromptBatch, prompt_of_B: np.ndarray, __: Any) -> Rollouts:
        asked, solutions = [], [solve(p) for p in problems()]
        tokens_BC = np.zeros((len(prompt_of_B), C), np.int32)
        length_B, logp_BC = np.zeros(len(prompt_of_B), np.int32), np.zeros((len(prompt_of_B), C), np.float32)
        for b, p in enumerate(prompt_of_B):
            problem = TOKENIZER.decode(prompts.tokens_PL[p])
            right = (True, False, b % 2 == 0)[checksum(problem) % 3]
            text = solve(problem) if right else next(s for s in solutions[b % N :] + solutions if s != solve(problem))
            tokens = [*TOKENIZER.encode(text), TOKENIZER.eos_id]
            tokens_BC[b, : len(tokens)], length_B[b] = tokens, len(tokens)
            logp_BC[b, : len(tokens)] = logp_of(problem, text)
            asked.append((int(p), problem, text))
        self.steps.append(asked)
        return Rollouts(tokens_BC, length_B, length_B > 0, logp_BC)


class Strict(ArithmeticVerifier):
    """The real grading; keeps the pairs."""

    def __init__(self) -> None:
        self.pairs: list[list[tuple[str, str]]] = []

    def grade_batch(self, pairs: Any) -> list[bool]:
        self.pairs.append(list(pairs))
        return super().grade_batch(pairs)


@dataclasses.dataclass
class Seen:
    """What went through the loop in two processes' worth of training."""

    folder: Path
    sampled: list[list[tuple[int, str, str]]]
    graded: list[list[tuple[str, str]]]
    batches: list[list[Any]]  # of each step
    stats: Any


def train_until(folder: Path, steps: int) -> tuple[Echo, Strict, list[Any], loop.Trainer]:
    echo, verifier, batches, trainers = Echo(), Strict(), [], []
    quiet = Echo()  # evaluation's
    rows = [(f"id {i}", p, solve(p), TOKENIZER.encode(p)) for i, p in enumerate(problems())]
    task = Task(TOKENIZER, make_prompt_set("train", rows), (), verifier)

    class Trainer(loop.Trainer):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            trainers.append(self)
            update = self.programs.update

            def spied(state: Any, mini: Any, old: Any, *, first: bool) -> Any:
                batches.append(jax.device_get(mini.batch))
                return update(state, mini, old, first=first)

            self.programs.update = spied

    path = folder.parent / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"run_dir": str(folder)}))
    with pytest.MonkeyPatch.context() as context:
        context.setattr(loop, "Trainer", Trainer)
        context.setattr(loop, "build_task", lambda *_: task)
        context.setattr(loop, "make_samplers", lambda *_: (echo, quiet))
        loop.train(load_config(path, [f"trainer.steps={steps}"]))
    return echo, verifier, batches, trainers[0]


@pytest.fixture(scope="module")
def seen(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("data_path") / "run"
    parts = [train_until(folder, steps) for steps in (RESUMED_AFTER, STEPS)]
    sampled = [step for echo, *_ in parts for step in echo.steps]
    graded = [pairs for _, verifier, *_ in parts for pairs in verifier.pairs]
    batches = [batch for *_, part, _ in parts for batch in part]
    updates = len(batches) // STEPS
    by_step = [batches[i * updates : (i + 1) * updates] for i in range(STEPS)]
    return Seen(folder, sampled, graded, by_step, jax.device_get(parts[-1][-1].history.prompts))


def test_this_run_shows_what_it_should(seen: Seen) -> None:
    """Unequal groups, all kinds of prompts, more than two epochs, a step with a prompt twice, and a resume."""
    assert len(seen.sampled) == STEPS
    metrics = read_metrics(seen.folder / "metrics.jsonl")[1:]
    assert STEPS * P > 2 * N
    assert max(m["allocation/max"] - m["allocation/min"] for m in metrics) >= 4
    assert all(0 < m["reward/mean"] < 1 and m["reward/mixed_groups"] > 0 for m in metrics)
    slots = [{slot: problem for slot, problem, _ in step} for step in seen.sampled]
    assert any(len(set(step.values())) < P for step in slots)
    assert len({solve(p) for p in problems()}) == N


def test_every_rollout_is_graded_against_its_own_prompts_answer(seen: Seen) -> None:
    for sampled, graded in zip(seen.sampled, seen.graded, strict=True):
        assert graded == [(text, solve(problem)) for _, problem, text in sampled]


def test_every_saved_rollout_belongs_together(seen: Seen) -> None:
    ids = {f"id {i}": p for i, p in enumerate(problems())}
    for step, sampled in enumerate(seen.sampled, 1):
        lines = (seen.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
        assert len(lines) == len(sampled)
        for line, (_, problem, text) in zip(map(json.loads, lines), sampled, strict=True):
            assert (ids[line["prompt_id"]], line["prompt"], line["text"]) == (problem, problem, text)
            assert line["answer"] == solve(problem)
            assert line["reward"] == float(text == solve(problem))


def test_every_row_of_every_update_belongs_together(seen: Seen) -> None:
    """Prompt, completion, log-probabilities and the advantage within the group, whatever the permutation."""
    for sampled, batches in zip(seen.sampled, seen.batches, strict=True):
        rewards: dict[int, list[float]] = {}
        for slot, problem, text in sampled:
            rewards.setdefault(slot, []).append(float(text == solve(problem)))
        expected: Counter[Any] = Counter()
        for slot, problem, text in sampled:
            group = np.array(rewards[slot])
            advantage = (float(text == solve(problem)) - group.mean()) / (group.std(ddof=1) + 1e-6)
            expected[problem, text, round(float(advantage), 3)] += 1
        found: Counter[Any] = Counter()
        order = []
        for batch in batches:
            for m, (length, size, advantage) in enumerate(zip(*batch[1:4], strict=True)):
                at = np.nonzero(batch.rows.rollout == m)
                assert len(at[0]) == length + size
                problem, text = (TOKENIZER.decode(x) for x in np.split(batch.rows.tokens[at], [length]))
                assert (length, size) == (len(problem), len(text) + 1)
                np.testing.assert_allclose(
                    batch.rows.sampled_logp[at][length - 1 : -1], logp_of(problem, text), atol=1e-6
                )
                found[problem, text, round(float(advantage), 3)] += 1
                order.append(problem)
        assert found == expected
        assert order != [problem for _, problem, _ in sampled]  # the rows were permuted


def test_statistics_are_each_prompts_own(seen: Seen) -> None:
    """Across the resume, and with a prompt twice in a step; the half-life is so long that nothing fades."""
    for n, problem in enumerate(problems()):
        own = [text == solve(problem) for step in seen.sampled for _, p, text in step if p == problem]
        assert seen.stats.successes_N[n] == pytest.approx(sum(own), rel=1e-4)
        assert seen.stats.trials_N[n] == pytest.approx(len(own), rel=1e-4)


def test_epochs_are_whole_across_the_resume(seen: Seen) -> None:
    """Every prompt once before any comes again."""
    drawn = [problem for step in seen.sampled for problem in {s: p for s, p, _ in step}.values()]
    for epoch in range(STEPS * P // N):
        assert sorted(drawn[epoch * N : (epoch + 1) * N]) == sorted(problems())
