"""What the tests of the command line share: a tiny run, and the form that every error has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from compiled import kept_in

from dynamo_jax import cli
from dynamo_jax import trainer as loop

TINY = {
    "task": {"max_prompt_tokens": 6, "arithmetic": {"train_prompts": 40, "heldout_prompts": 8, "max_operations": 2}},
    "policy": {
        "architecture": {
            "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 8,
            "vocab_size": 24,  # the tokenizer has 16; real models' vocabularies are padded too
        }
    },
    "rollout": {"prompts": 8, "per_prompt": 2, "max_tokens": 3},
    "allocation": {"low": 1, "high": 4},
    "trainer": {"steps": 2},
    "eval": {"every": 0, "samples": 2, "k": [1, 2]},
    "checkpoint": {"every": 1, "notice_seconds": 1e6},
    "logging": {"tensorboard": False, "progress": False},
}  # fmt: skip
MATH = {"kind": "math", "max_prompt_tokens": 64, "chat_template": False}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(xla_folder: Path) -> Iterator[None]:
    """The commands here run the same few programs again and again."""
    yield from kept_in(xla_folder)


def write_config(folder: Path, run_dir: Path | None = None, **changes: object) -> Path:
    path = folder / "config.yaml"
    tree = {"run_dir": str(run_dir or folder / "run"), **TINY, **changes}
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two steps. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("trained")
    assert cli.main(["train", str(write_config(folder))]) == 0
    return folder / "run"


def snapshot(path: Path) -> dict[str, bytes]:
    """Every file's content; the lock, which holds a process id, aside."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The one paragraph that the command ends with."""
    assert cli.main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    err = err[err.index("dynamo-jax: error: ") :]  # log lines may come before it
    assert err.endswith("\n")
    assert "\n\n" not in err
    assert "Traceback" not in err
    return err


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever compiles or trains fails the test."""

    def forbidden(*_: object) -> None:
        pytest.fail("the run began")

    monkeypatch.setattr(loop.Trainer, "run", forbidden)
