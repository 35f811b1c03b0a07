"""The loop as a whole: compiled once, the same on every mesh and micro-batch, and after every kind of interruption."""

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from small_runs import MESH, STEPS, Coin, Run, Spy, coin, patched, run, timeless, write_config

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.batch import PromptBatch, Rollouts
from dynamo_jax.config import load_config
from dynamo_jax.rounds import Draw
from dynamo_jax.run import phases
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.run.keeper import Keeper
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.run.phases import Phases
from dynamo_jax.run.stopping import Stopping
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer
from dynamo_jax.tasks.rewards import Grading

pytestmark = pytest.mark.usefixtures("compiled_once")

TRACES = {"score": 1, "terms": 0, "update": 1, "update (apply)": 0}  # a mini-batch is one micro-batch


@pytest.fixture(scope="module")
def whole(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Five steps of two updates each, evaluations in between, on one device, without interruption."""
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def on_mesh(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("mesh") / "run", *MESH)


@pytest.fixture(scope="module")
def quarters(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("quarters") / "run", "trainer.micro_batch=4")


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
        assert trainer.programs.traces == TRACES
        assert trainer.allocation.traces == {"allocate": 1, "record": 1}


def test_run_folder_has_a_line_a_step_and_what_design_names(whole: Run) -> None:
    assert [x["step"] for x in whole.metrics] == list(range(STEPS + 1))
    assert [x["step"] for x in whole.metrics if "eval/heldout/pass@1" in x] == [0, 2, 4, 5]
    assert (whole.folder / "report.html").is_file()
    named = {
        "reward/mean", "allocation/min", "allocation/max", "allocation/entropy", "objective/entropy",
        "objective/clip_fraction", "objective/kl_old_new", "objective/grad_norm", "modulation/comp_mean",
        "modulation/stab_mean", "rollout/length_mean", "rollout/truncated_fraction", "rollout/logp_drift",
        "reward/prompt_mean",
    }  # fmt: skip
    for line in read_metrics(whole.folder / "metrics.jsonl")[1:]:
        assert {"time/sample", "time/decode", "time/grade", "time/score", "time/update"} <= line.keys()
    assert all(named <= x.keys() for x in whole.metrics[1:])
    assert max(x["rollout/logp_drift"] for x in whole.metrics[1:]) < 1e-4
    assert int(whole.trainer.state.updates) == 2 * STEPS
    assert any(x["reward/mixed_groups"] > 0.3 for x in whole.metrics[1:])


def test_making_text_is_not_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces take two seconds each, a tokenizer ten for each of their five rollouts; the end is known after one."""
    clock = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: clock[0])

    class Slow(ArithmeticTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            clock[0] += 10
            return super().decode(ids)

    def pieces(*_: Any) -> Iterator[Rollouts]:
        for n in (3, 2):
            clock[0] += 2
            yield Rollouts(np.full((n, 2), n + 1), np.full(n, 2, np.int32), np.zeros(n, bool), np.zeros((n, 2)))
        clock[0] += 1

    names = ("1", "22", "3")
    prompts = PromptBatch(np.arange(3), np.zeros((3, 1)), np.ones(3), names, names, names)
    trainer, verifier = loop.Trainer.__new__(loop.Trainer), Coin()
    trainer.config = load_config(write_config(tmp_path / "run"))
    trainer.task = SimpleNamespace(tokenizer=Slow(), verifier=verifier)
    trainer.state, trainer.stopping = SimpleNamespace(params=None), Stopping()
    trainer.sampler = SimpleNamespace(pieces=pieces)
    trainer.phase = Phases()
    with closing(Grading(verifier)) as trainer.grading:
        draw = Draw(prompts, np.array([0, 0, 1, 1, 2]), np.full(3, 0.5, np.float32))
        pool = trainer._sample_and_grade(draw, jax.random.key(0))
    assert trainer.phase.seconds == {"sample": 5.0, "decode": 50.0, "grade": 0.0}
    outputs = [Slow().decode([n + 1] * 2) for n in (3, 3, 3, 2, 2)]
    answers = [names[p] for p in pool.prompt_of_R]
    assert pool.right_R.tolist() == [coin(output, gold) for output, gold in zip(outputs, answers, strict=True)]


def test_second_update_of_a_step_is_modulated_by_the_policy_as_it_is_then(quarters: Run) -> None:
    for first, second in zip(quarters.trainer.seen[::2], quarters.trainer.seen[1::2], strict=True):
        for name in ("logp", "entropy", "lambda_mean"):
            get = [getattr(x, name) for x in (first["now"], first["old"], second["now"], second["old"])]
            np.testing.assert_array_equal(get[0], get[1])
            np.testing.assert_array_equal(get[2], getattr(second["fresh"], name))
            assert np.abs(get[2] - get[3]).max() > 1e-4  # the first update has moved the policy


def assert_same(a: Run, b: Run, but: str = "") -> None:
    for step in range(1, STEPS + 1):
        assert a.rollouts(step) == b.rollouts(step), f"step {step}"
    for x, y in zip(a.metrics, b.metrics, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - {but}:
            assert x[name] == pytest.approx(y[name], abs=1e-5, rel=1e-5), f"step {x['step']}: {name}"


def test_eight_devices_sample_and_learn_the_same(whole: Run, on_mesh: Run) -> None:
    assert len(on_mesh.trainer.state.params.embedding[...].sharding.device_set) == 8
    assert_same(whole, on_mesh)


def test_the_policy_after_warm_up_does_not_know_the_mesh(whole: Run, on_mesh: Run) -> None:
    """To the bit: a hundred optimizer steps turn the last bit of a sum into another policy."""
    one, eight = (x.trainer.seen[0]["before"].params for x in (whole, on_mesh))
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_packed_micro_batches_of_a_quarter_learn_the_same(whole: Run, quarters: Run) -> None:
    """Each program is still traced once; rows that hold nothing are left out by the micro-batch."""
    assert quarters.trainer.programs.traces == {"score": 1, "terms": 1, "update": 1, "update (apply)": 1}
    padding = [[x["update/padding_fraction"] for x in run.metrics[1:]] for run in (whole, quarters)]
    assert all(0 <= b <= a < 1 for a, b in zip(*padding, strict=True))
    assert_same(whole, quarters, but="update/padding_fraction")


def test_resumed_and_extended_run_equals_the_uninterrupted_one(whole: Run, tmp_path: Path) -> None:
    """Stopped after step 2, then extended with other values of keys that change no result."""
    run(tmp_path / "run", "trainer.steps=2")
    again = run(tmp_path / "run", "logging.rollouts_per_step=4", "checkpoint.every=1", "verifier.workers=1")
    assert again.trainer.seen[0]["before"].updates == 4  # it went on, and did not start anew
    assert again.metrics == whole.metrics
    assert again.trainer.programs.traces == TRACES
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


def test_signal_in_the_evaluation_ends_it_and_keeps_the_step(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is saved before; its line is written by the next start, which evaluates."""
    arguments = ["train", str(write_config(tmp_path / "run", checkpoint={"every": 50, "notice_seconds": 1e6}))]
    with monkeypatch.context() as context:
        patched(context)
        calls, evaluate = iter(range(9)), Spy._evaluate

        def signalled(trainer: Spy) -> dict[str, float]:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(trainer)

        context.setattr(Spy, "_evaluate", signalled)
        assert cli.main(arguments) == 128 + signal.SIGTERM
    assert [x["step"] for x in timeless(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    made = patched(monkeypatch)
    assert cli.main(arguments) == 0
    assert len(made[0].seen) == 6
    assert timeless(tmp_path / "run") == whole.metrics
    assert "time/step" in read_metrics(tmp_path / "run" / "metrics.jsonl")[2]  # of the step that was made before


@pytest.mark.parametrize("moment", ["evaluation", "line", "score"])
def test_death_after_a_step_is_saved_costs_nothing_of_it(
    whole: Run, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is evaluated and saved: dead before its evaluation, its line or its score, it is not done again."""
    place, name, dies_at = {  # of evaluations and scores the second, of lines the third
        "evaluation": (loop.Trainer, "_evaluate", 1),
        "line": (Keeper, "write", 2),
        "score": (Keeper, "add_score", 1),
    }[moment]
    calls, original = iter(range(9)), getattr(place, name)

    def dies(self: Any, *arguments: Any) -> Any:
        if next(calls) == dies_at:
            raise AssertionError("killed")
        return original(self, *arguments)

    arguments = ["train", str(write_config(tmp_path / "run")), "trainer.steps=2"]
    with monkeypatch.context() as context:
        patched(context)
        context.setattr(place, name, dies)
        with pytest.raises(AssertionError, match="killed"):
            cli.main(arguments)
    assert [x["step"] for x in timeless(tmp_path / "run")] == [0, 1, *([2] if moment == "score" else [])]
    made = patched(monkeypatch)
    assert cli.main(arguments) == 0
    assert not made[0].seen  # both steps were done
    assert timeless(tmp_path / "run") == whole.metrics[:3]
    assert Run(tmp_path / "run", made[0]).rollouts(2) == whole.rollouts(2)
    scores = [line["eval/heldout/pass@1"] for line in (whole.metrics[0], whole.metrics[2])]
    with Checkpointer(tmp_path / "run" / "checkpoints", keep=2, read_only=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([0, 2], 0 if scores[0] > scores[1] else 2)


def test_slow_steps_are_saved_each_and_end_between_their_updates(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes in the first of step 4's two updates: the second is not made, and step 3 has a checkpoint."""
    checkpoint = {"every": 50, "keep": 9, "notice_seconds": 0.0}
    arguments = ["train", str(write_config(tmp_path / "run", checkpoint=checkpoint))]
    with monkeypatch.context() as context:
        made = patched(context)
        seen = Spy.see

        def see(spy: Spy, entry: dict[str, Any]) -> None:
            seen(spy, entry)
            if len(spy.seen) == 7:
                os.kill(os.getpid(), signal.SIGTERM)

        context.setattr(Spy, "see", see)
        assert cli.main(arguments) == 128 + signal.SIGTERM
    assert len(made[0].seen) == 7
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "1", "2", "3"]
    made = patched(monkeypatch)
    assert cli.main(arguments) == 0
    assert len(made[0].seen) == 4
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
    assert all(np.isfinite(x["objective/loss"]) for x in poisoned.metrics[1:])  # the mean of the updates that happened
    for name in ("objective/loss", "objective/grad_norm"):
        assert f"step 2, update {skipped - 1}: {name} is nan; the update is skipped" in messages
