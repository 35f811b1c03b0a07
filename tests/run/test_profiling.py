"""A window of steps under the profiler."""

import jax
import pytest
from command_line import compiled_once, write_config

from dynamo_jax import cli
from dynamo_jax.run.profiling import Profile

__all__ = ["compiled_once"]  # a fixture


@pytest.fixture
def calls(monkeypatch):
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: made.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append(("stop",)))
    return made


def run(profile, steps):
    with profile:
        for step in steps:
            with profile.of(step):
                pass


@pytest.mark.parametrize(
    ("window", "steps", "traced"),
    [
        ((2, 3), range(1, 6), 2),
        ((3, 3), range(1, 6), 1),
        ((2, 9), range(4, 6), 2),  # a resumed run begins in the window, and ends in it
        ((1, 2), range(4, 6), 0),
        (None, range(1, 6), 0),
    ],
)
def test_window(tmp_path, calls, monkeypatch, window, steps, traced):
    annotated = []
    monkeypatch.setattr(
        jax.profiler,
        "StepTraceAnnotation",
        lambda name, step_num: annotated.append(step_num) or pytest.MonkeyPatch.context(),
    )
    run(Profile(tmp_path, window), steps)
    assert len(annotated) == traced
    assert calls == ([("start", str(tmp_path)), ("stop",)] if traced else [])


def test_a_step_that_fails_leaves_its_trace(tmp_path, calls):
    with pytest.raises(KeyError), Profile(tmp_path, (1, 5)) as profile, profile.of(1):
        raise KeyError
    assert calls[-1] == ("stop",)


def test_train_writes_a_trace(tmp_path):
    config = write_config(tmp_path, trainer={"steps": 3})
    assert cli.main(["train", str(config), "--profile-steps", "2:2"]) == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


@pytest.mark.parametrize("text", ["0:2", "3:2", "x", "1:2:3", "-1"])
def test_what_is_no_window(capsys, tmp_path, text):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(write_config(tmp_path)), f"--profile-steps={text}"])
    assert stop.value.code == 2
    assert "FIRST:LAST" in capsys.readouterr().err
