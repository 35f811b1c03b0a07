"""The loop as a whole: compiled once, the same on every mesh and micro-batch, and after every kind of interruption."""

import dataclasses
import logging
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.config import load_config
from dynamo_jax.metrics import read_metrics
from dynamo_jax.tasks.arithmetic import ArithmeticVerifier
from dynamo_jax.tasks.task import build_task

pytestmark = pytest.mark.usefixtures("compiled_once")

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
    "checkpoint": {"every": 2},
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
        update, advantage, calls = self.programs.update, self.advantage, iter(range(1, 100))

        def spied(state: Any, batch: Any, old: Any, now: Any) -> Any:
            fresh = self.programs.score(state.params, batch)[0]
            entry = jax.device_get({"before": state, "old": old, "now": now, "fresh": fresh})  # donated just below
            state, metrics = update(state, batch, old, now)
            self.seen.append(entry | {"after": jax.device_get(state)})
            return state, metrics

        def poisoned(reward_B: Any, prompt_of_B: Any) -> Any:
            advantage_B = advantage(reward_B, prompt_of_B)
            return advantage_B.at[0].set(np.nan) if next(calls) == self.poison else advantage_B

        self.programs.update, self.advantage = spied, poisoned


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
    context.setattr(loop, "build_task", lambda c: dataclasses.replace(build_task(c), verifier=verifier or Coin()))
    return made


def run(folder: Path, *overrides: str, poison: int = 0) -> Run:
    with pytest.MonkeyPatch.context() as context:
        made = patched(context, poison=poison)
        loop.train(load_config(write_config(folder), overrides))
    return Run(folder, made[-1])


@pytest.fixture(scope="module")
def whole(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five steps of two updates each, evaluations in between, on one device, without interruption."""
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def on_mesh(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("mesh") / "run", *MESH)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs from `train` on; pytest's own capture sees nothing, as the logger does not propagate."""
    records: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    with pytest.MonkeyPatch.context() as context:
        context.setattr(loop, "setup_logging", lambda _: logging.getLogger("dynamo_jax").addHandler(keep))
        keep = Keep()
        yield records
    logging.getLogger("dynamo_jax").removeHandler(keep)


def test_whatever_the_allocation_each_program_is_traced_once(whole: Run, on_mesh: Run) -> None:
    shares = {(x["allocation/min"], x["allocation/max"], x["allocation/entropy"]) for x in whole.metrics[1:]}
    assert len(shares) > 2, "the allocations did not change, so this shows nothing"
    for trainer in (whole.trainer, on_mesh.trainer):
        assert trainer.sampler.traces == 1
        assert trainer.eval_sampler is trainer.sampler
        assert trainer.programs.traces == {"score": 1, "update": 1}
        assert trainer.allocation.traces == {"allocate": 1, "record": 1}


def test_run_folder_has_a_line_a_step_and_what_design_names(whole: Run) -> None:
    assert [x["step"] for x in whole.metrics] == list(range(STEPS + 1))
    assert [x["step"] for x in whole.metrics if "eval/heldout/pass@1" in x] == [0, 2, 4, 5]
    assert (whole.folder / "report.html").is_file()
    named = {
        "reward/mean", "allocation/min", "allocation/max", "allocation/entropy", "objective/entropy",
        "objective/clip_fraction", "objective/kl_old_new", "objective/grad_norm", "modulation/comp_mean",
        "modulation/stab_mean", "rollout/length_mean", "rollout/truncated_fraction", "rollout/logp_drift",
    }  # fmt: skip
    assert all(named <= x.keys() for x in whole.metrics[1:])
    assert max(x["rollout/logp_drift"] for x in whole.metrics[1:]) < 1e-4
    assert int(whole.trainer.state.updates) == 2 * STEPS
    assert any(x["reward/mixed_groups"] > 0.3 for x in whole.metrics[1:])


def test_second_update_of_a_step_is_modulated_by_the_policy_as_it_is_then(whole: Run) -> None:
    for first, second in zip(whole.trainer.seen[::2], whole.trainer.seen[1::2], strict=True):
        for name in ("logp", "entropy", "lambda_mean"):
            get = [getattr(x, name) for x in (first["now"], first["old"], second["now"], second["old"])]
            np.testing.assert_array_equal(get[0], get[1])
            np.testing.assert_array_equal(get[2], getattr(second["fresh"], name))
            assert np.abs(get[2] - get[3]).max() > 1e-4  # the first update has moved the policy


def assert_same(a: Run, b: Run) -> None:
    for step in range(1, STEPS + 1):
        assert a.rollouts(step) == b.rollouts(step), f"step {step}"
    for x, y in zip(a.metrics, b.metrics, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-5), f"step {x['step']}: {name}"


def test_eight_devices_sample_and_learn_the_same(whole: Run, on_mesh: Run) -> None:
    assert len(on_mesh.trainer.state.params.embedding[...].sharding.device_set) == 8
    assert_same(whole, on_mesh)


def test_the_policy_after_warm_up_does_not_know_the_mesh(whole: Run, on_mesh: Run) -> None:
    """To the bit: a hundred optimizer steps turn the last bit of a sum into another policy."""
    one, eight = (x.trainer.seen[0]["before"].params for x in (whole, on_mesh))
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_micro_batches_of_a_quarter_learn_the_same(whole: Run, tmp_path: Path) -> None:
    assert_same(whole, run(tmp_path / "run", "trainer.micro_batch=4"))


def test_resumed_and_extended_run_equals_the_uninterrupted_one(whole: Run, tmp_path: Path) -> None:
    """Stopped after step 2, then extended with other values of keys that change no result."""
    run(tmp_path / "run", "trainer.steps=2")
    again = run(tmp_path / "run", "logging.rollouts_per_step=4", "checkpoint.every=1", "verifier.workers=1")
    assert again.trainer.seen[0]["before"].updates == 4  # it went on, and did not start anew
    assert again.metrics == whole.metrics
    assert again.trainer.programs.traces == {"score": 1, "update": 1}
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["trainer"]["steps"], config["checkpoint"]["every"]) == (STEPS, 1)


def test_run_may_be_resumed_on_another_mesh(whole: Run, tmp_path: Path) -> None:
    run(tmp_path / "run", "trainer.steps=2", *MESH)
    assert_same(whole, run(tmp_path / "run"))


@pytest.mark.parametrize("change", ["optimizer.learning_rate=1e-3", "seed=1", "rollout.temperature=0.9"])
def test_resume_with_another_result_is_refused(
    whole: Run, change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole.folder / "metrics.jsonl").read_bytes()
    patched(monkeypatch)
    path = write_config(whole.folder)
    assert cli.main(["train", str(path), change, "trainer.steps=9"]) == 2
    error = capsys.readouterr().err
    assert f"{change.split('=')[0]}: " in error
    assert "Traceback" not in error
    assert (whole.folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_in_the_middle_of_a_step_saves_and_loses_nothing(
    whole: Run, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 has no checkpoint by itself, and the signal comes while step 4 is graded (evaluations count as calls)."""
    step_4 = 1 + 2 + 1 + 1 + 1  # evaluation, two steps, evaluation, step 3, step 4
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    arguments = ["train", str(write_config(tmp_path / "run"))]
    with monkeypatch.context() as context:
        made = patched(context, Coin(lambda call: os.kill(os.getpid(), number) if call == step_4 else None))
        assert cli.main(arguments) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err
    assert [x["step"] for x in timeless(tmp_path / "run")] == [0, 1, 2, 3]
    assert (tmp_path / "run" / "checkpoints" / "3").is_dir()
    assert len(made[0].seen) == 6

    made = patched(monkeypatch)
    assert cli.main(arguments) == 0
    assert len(made[0].seen) == 4  # steps 4 and 5 only
    assert timeless(tmp_path / "run") == whole.metrics
    assert Run(tmp_path / "run", made[0]).rollouts(4) == whole.rollouts(4)


def test_signal_in_the_evaluation_keeps_the_step(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", str(write_config(tmp_path / "run", checkpoint={"every": 50}))]
    with monkeypatch.context() as context:
        patched(context, Coin(lambda call: os.kill(os.getpid(), signal.SIGTERM) if call == 4 else None))
        assert cli.main(arguments) == 128 + signal.SIGTERM
    assert [x["step"] for x in timeless(tmp_path / "run")] == [0, 1, 2]
    made = patched(monkeypatch)
    assert cli.main(arguments) == 0
    assert len(made[0].seen) == 6
    assert timeless(tmp_path / "run") == whole.metrics


def test_update_that_is_not_finite_is_skipped_counted_and_named(tmp_path: Path, messages: list[str]) -> None:
    """One rollout of step 2 has no advantage: of the step's two updates only that of its mini-batch is skipped."""
    poisoned = run(tmp_path / "run", "trainer.steps=3", poison=2)
    changed = []
    for entry in poisoned.trainer.seen:
        pairs = zip(*(jax.tree.leaves(entry[x][:2]) for x in ("before", "after")), strict=True)  # params, opt_state
        changed.append(any(a.tobytes() != b.tobytes() for a, b in pairs))
    assert changed.count(False) == 1
    skipped = changed.index(False)
    assert skipped in (2, 3)
    state = poisoned.trainer.state
    assert (int(state.updates), int(state.skipped)) == (5, 1)
    assert [x["objective/skipped_updates"] for x in poisoned.metrics[1:]] == [0, 1, 0]
    assert poisoned.metrics[2]["objective/loss"] is None
    assert np.isfinite(poisoned.metrics[3]["objective/loss"])
    for name in ("objective/loss", "objective/grad_norm"):
        assert f"step 2, update {skipped - 1}: {name} is nan; the update is skipped" in messages
