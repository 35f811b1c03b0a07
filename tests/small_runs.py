"""Whole runs of a few small steps, for the tests that compare them: a verifier that teaches, a trainer that tells."""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from dynamo_jax import trainer as loop
from dynamo_jax.config import load_config
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.tasks.arithmetic import ArithmeticVerifier
from dynamo_jax.tasks.task import build_task

STEPS = 5
TINY = {
    "run_dir": "unused",
    "task": {"max_prompt_tokens": 8, "arithmetic": {"train_prompts": 16, "heldout_prompts": 8, "max_operations": 3}},
    "policy": {
        "architecture": {
            "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 16,
            "vocab_size": 16, "tie_word_embeddings": False,  # tied, a random policy repeats itself and never ends
        }
    },
    "warmup": {"steps": 3, "batch": 16},
    "rollout": {"prompts": 8, "per_prompt": 4, "max_tokens": 5},
    "allocation": {"low": 2, "high": 8, "half_life": 10.0},
    "optimizer": {"learning_rate": 5e-3},
    "trainer": {"steps": STEPS, "mini_batch": 16},
    "eval": {"every": 2, "samples": 2, "k": [1, 2]},
    "checkpoint": {"every": 2, "notice_seconds": 1e6},  # no step is slow, however busy the machine
    "logging": {"tensorboard": False, "progress": False, "rollouts_per_step": 32},
}  # fmt: skip
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


class Coin(ArithmeticVerifier):
    """Right or wrong by a hash of output and answer: a policy without warm-up would get nothing right to learn from.

    The shorter the answer, the more outputs are right, so that prompts differ and their allocations move.
    """

    def __init__(self, on_call: Callable[[int], None] = lambda _: None) -> None:
        self.calls, self.on_call = 0, on_call

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        self.calls += 1
        self.on_call(self.calls)
        return [coin(output, gold) for output, gold in pairs]


def coin(output: str, gold: str) -> bool:
    return zlib.crc32(f"{output}|{gold}".encode()) % 16 >= 7 * len(gold) - 6  # 15, 8 or 1 of 16


class Spy(loop.Trainer):
    """A trainer that says, for every update, what went in and came out."""

    poison: int = 0  # the step whose first rollout gets an advantage that is not a number

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: list[dict[str, Any]] = []
        update, terms, nows = self.programs.update, self.programs.terms_program, []
        advantage, calls = self.advantage, iter(range(1, 100))

        def spied(state: Any, mini: Any, old: Any, *, first: bool) -> Any:
            fresh = self.programs.score(state.params, mini)[0]
            entry = jax.device_get({"before": state, "old": old, "fresh": fresh})  # donated just below
            state, metrics = update(state, mini, old, first=first)
            # Where a mini-batch is one micro-batch nobody says what the statistics of the update's own pass are.
            self.see(entry | {"after": jax.device_get(state), "now": nows.pop() if nows else None})
            return state, metrics

        def spied_terms(params: Any, batch: Any, old_logp: Any, now: Any) -> Any:
            nows.append(jax.device_get(now))
            return terms(params, batch, old_logp, now)

        def poisoned(reward_B: Any, prompt_of_B: Any) -> Any:
            advantage_B = advantage(reward_B, prompt_of_B)
            return advantage_B.at[0].set(np.nan) if next(calls) == self.poison else advantage_B

        self.programs.update, self.programs.terms_program, self.advantage = spied, spied_terms, poisoned

    def see(self, entry: dict[str, Any]) -> None:
        self.seen.append(entry)


@dataclasses.dataclass
class Run:
    """A finished run: its folder, its trainer, its metrics without those that measure time."""

    folder: Path
    trainer: Spy

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return timeless(self.folder)

    def rollouts(self, step: int) -> str:
        return (self.folder / "rollouts" / f"step_{step:06d}.jsonl").read_text()


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in x.items() if not k.startswith("time/") and "per_second" not in k} for x in lines]


def write_config(folder: Path, **sections: Any) -> Path:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(TINY | {"run_dir": str(folder)} | sections))
    return path


def patched(context: pytest.MonkeyPatch, verifier: Any = None, poison: int = 0) -> list[Spy]:
    """Trainers made from here on are spies with this verifier, and come in the list."""
    made: list[Spy] = []

    def spy(*arguments: Any) -> Spy:
        made.append(Spy(*arguments))
        made[-1].poison = poison
        return made[-1]

    context.setattr(loop, "Trainer", spy)
    context.setattr(
        loop, "build_task", lambda *given: dataclasses.replace(build_task(*given), verifier=verifier or Coin())
    )
    return made


def run(folder: Path, *overrides: str, poison: int = 0) -> Run:
    with pytest.MonkeyPatch.context() as context:
        made = patched(context, poison=poison)
        loop.train(load_config(write_config(folder), overrides))
    return Run(folder, made[-1])
