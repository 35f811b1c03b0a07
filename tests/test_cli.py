"""Words, devices, data and run folders: what a user can mend is one paragraph and exit status 2, before any work."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import MATH, no_work, refused, snapshot, write_config

from dynamo_jax import cli
from dynamo_jax import trainer as loop
from dynamo_jax.run import folder


def run(*argv: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as users start it, without the eight devices of the tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | environment
    words = [sys.executable, "-m", "dynamo_jax", *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, env=env, timeout=120)


# --- as users start it


def test_a_config_error_needs_no_jax(tmp_path):
    # Importing jax, orbax and transformers takes seconds; a typing error must be told at once.
    code = """
import sys
from dynamo_jax import cli
from dynamo_jax.run import folder
status = cli.main(sys.argv[1:])
slow = {"jax", "numpy", "orbax", "transformers", "flax", "grain"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else status)
"""
    bad = write_config(tmp_path, trainer={"stepz": 1})
    done = subprocess.run([sys.executable, "-c", code, "train", bad], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"dynamo-jax: error: {bad}: trainer.stepz: unknown key. Did you mean 'steps'?\n"


def test_the_module_runs_with_the_same_exit_status(tmp_path):
    done = run("train", tmp_path / "no.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"dynamo-jax: error: {tmp_path}/no.yaml: no such config file")
    assert "Traceback" in run("--traceback", "train", tmp_path / "no.yaml").stderr


@pytest.mark.parametrize("device", ["tpu", "gpu"])
def test_a_device_that_is_not_there(tmp_path, device):
    done = run("train", write_config(tmp_path), f"device={device}", CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"device = {device}: jax finds no such device here" in done.stderr
    assert "device=cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["train"], "config"),
        (["eval", "c.yaml"], "--checkpoint"),
        (["export", "c.yaml", "--checkpoint", "c"], "--out"),
        (["report", "--out", "x.html"], "RUN"),
        (["eval", "c.yaml", "--checkpoint", "c", "--samples", "0"], "'0' is not a whole number of at least 1"),
        (["eval", "c.yaml", "--checkpoint", "c", "--k", "1", "x"], "'x' is not a whole number of at least 1"),
        (["train", "c.yaml", "--steps", "3"], "unrecognized arguments: --steps"),
    ],
)
def test_wrong_words(capsys, words, expected):
    with pytest.raises(SystemExit) as error:
        cli.main(words)
    assert error.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "c.yaml seed=1 eval.k=[1,2] --checkpoint a=b --benchmark x/a=b.jsonl y --k 1 2",
        "c.yaml --checkpoint a=b seed=1 eval.k=[1,2] --benchmark x/a=b.jsonl y --k 1 2",
        "c.yaml --checkpoint a=b --k 1 2 seed=1 --benchmark x/a=b.jsonl y eval.k=[1,2]",
        "--checkpoint a=b seed=1 --benchmark x/a=b.jsonl y --k 1 2 eval.k=[1,2] -- c.yaml",
        "c.yaml --checkpoint a=b --benchmark x/a=b.jsonl y --allow-dropped seed=1 --k 1 2 eval.k=[1,2]",
    ],
)
def test_overrides_may_stand_anywhere(monkeypatch, words):
    seen = []
    monkeypatch.setattr(cli, "load_config", lambda path, overrides: seen.append((path, overrides)))
    monkeypatch.setattr(
        "dynamo_jax.evaluation.command.eval_command", lambda *arguments, **more: seen.append((arguments, more))
    )
    assert cli.main(["eval", *words.split()]) == 0
    assert seen[0] == (Path("c.yaml"), ["seed=1", "eval.k=[1,2]"])
    assert seen[1][0] == (None, Path("a=b"), ["x/a=b.jsonl", "y"], 32, [1, 2], None, None, False)
    assert seen[1][1] == {"allow_dropped": "--allow-dropped" in words}


@pytest.mark.parametrize("override", ["run_dir=-x --y  z ", "run_dir=a\nb=c", "run_dir=", "task.train=*", "seed=-1"])
@pytest.mark.parametrize(
    "words",
    [
        "train",
        "eval --checkpoint c",
        "export --checkpoint c --out o",
        "plan --topology v --lengths prompt=1,response=2",
    ],
)
def test_an_override_is_one_word_whatever_it_holds(monkeypatch, words, override):
    seen = []

    def load(path, overrides):
        seen.append(overrides)
        raise ValueError

    monkeypatch.setattr(cli, "load_config", load)
    name, *options = words.split()
    assert cli.main([name, "c.yaml", *options, override, "seed=3"]) == 2
    assert cli.main([name, override, *options, "seed=3", "c.yaml"]) == 2
    assert seen == [[override, "seed=3"]] * 2


def test_a_report_takes_runs_with_any_name(capsys, tmp_path):
    assert "lr=1: no such run folder" in refused(capsys, "report", "lr=1", "--out", tmp_path / "x.html")


@pytest.mark.parametrize(("samples", "ks"), [("32", [1, 8, 32]), ("8", [1, 8]), ("4", [1])])
def test_the_default_k_is_what_the_samples_allow(monkeypatch, samples, ks):
    seen = []
    monkeypatch.setattr(cli, "load_config", lambda *_: None)
    monkeypatch.setattr("dynamo_jax.evaluation.command.eval_command", lambda *words, **_: seen.append(words[4]))
    assert cli.main(["eval", "c.yaml", "--checkpoint", "c", "--samples", samples]) == 0
    assert seen == [ks]


def test_ctrl_c_before_the_loop_is_no_traceback(capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_config", interrupted)
    assert cli.main(["train", "c.yaml"]) == 130
    assert capsys.readouterr().err == "dynamo-jax: interrupted\n"


# --- what stops a run before it makes anything


GOOD_ROW = json.dumps({"id": "1", "problem": "2+3=?", "answer": "5"})
DATA = {
    "missing": (None, ["no such data file", "task.train"]),
    "empty": ("", ["has no rows"]),
    "broken JSON": (f"{GOOD_ROW}\n{{broken\n", ["line 2", "not valid JSON"]),
    "no answer": (f'{GOOD_ROW}\n\n{{"problem": "2+2=?"}}\n', ["line 3", "has no answer", "ground_truth"]),
    "no prompt": ('{"answer": "4"}\n', ["line 1", "has no prompt"]),
    "too few": (f"{GOOD_ROW}\n", ["1 prompts", "takes 8", "rollout.prompts to at most 1"]),
}


@pytest.mark.shared
@pytest.mark.parametrize("name", DATA)
def test_data(capsys, monkeypatch, tmp_path, shared, name):
    no_work(monkeypatch)
    text, expected = DATA[name]
    path = tmp_path / "train.jsonl"
    if text is not None:
        path.write_text(text)
    tokenizer = str(shared / "data" / "qwen2.5-math-1.5b")
    config = write_config(tmp_path, task=MATH | {"train": [str(path)], "tokenizer": tokenizer})
    message = refused(capsys, "train", config, "policy.architecture.vocab_size=null")
    # "too few" is known by the data set's name: its prompts may come from several files.
    for part in ("train:" if name == "too few" else str(path), *expected):
        assert part in message
    assert not (tmp_path / "run").exists()


def test_tokenizer_and_weights_that_are_not_there(capsys, monkeypatch, tmp_path):
    no_work(monkeypatch)
    nowhere = str(tmp_path / "nowhere")
    config = write_config(tmp_path, task=MATH | {"train": ["x.jsonl"], "tokenizer": nowhere})
    message = refused(capsys, "train", config)
    assert f"{nowhere}: no such folder" in message
    assert "task.tokenizer" in message
    config = write_config(tmp_path, policy={"load": nowhere})
    message = refused(capsys, "train", config)
    assert f"{nowhere}/config.json" in message
    assert "policy.load" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # Sixteen devices where the tests have eight.
        ("mesh.data=16", ["data 16 x fsdp 1 x tensor 1 needs 16 devices", "there are 8", "smaller mesh.data"]),
        ("task.arithmetic.max_operations=1", None),
        ("task.arithmetic={train_prompts: 5000, max_operations: 2}", ["5000", "too many", "max_operations"]),
        ("policy.architecture.vocab_size=15", ["vocab_size = 15", "ids up to 15", "larger vocab_size"]),
    ],
)
def test_what_only_the_machine_or_the_task_can_tell(capsys, monkeypatch, tmp_path, override, expected):
    no_work(monkeypatch)
    config = write_config(tmp_path)
    if expected is None:  # the neighbour of the case below it is allowed
        monkeypatch.setattr(loop.Trainer, "run", lambda *_: None)
        monkeypatch.setattr(loop, "write_report", lambda *_: None)
        assert cli.main(["train", str(config), override]) == 0
        return
    message = refused(capsys, "train", config, override)
    for part in expected:
        assert part in message
    assert not (tmp_path / "run").exists()


# --- run folders that cannot be used: told before warm-up or any step


def test_run_folder_below_a_file(capsys, monkeypatch, tmp_path):
    no_work(monkeypatch)
    config = write_config(tmp_path)
    message = refused(capsys, "train", config, f"run_dir={config}/run")
    assert f"{config}/run: cannot be written: Not a directory" in message
    assert "run_dir" in message


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_read_only_or_full_run_folder(capsys, monkeypatch, tmp_path, code):
    no_work(monkeypatch)

    def fail(_: object) -> None:
        raise OSError(code, os.strerror(code))

    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(folder.RunFolder, "_probe", fail)
    message = refused(capsys, "train", write_config(tmp_path))
    assert f"{tmp_path}/run: cannot be written: {os.strerror(code)}" in message
    assert "set another run_dir" in message


def test_full_disk(capsys, monkeypatch, tmp_path):
    no_work(monkeypatch)
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a full disk needs the right to mount one")
    try:
        message = refused(capsys, "train", write_config(tmp_path, run_dir=disk / "run"))
        assert f"{disk}/run: cannot be written: No space left on device" in message
        assert "Free space" in message
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_of_something_else_is_left_alone(capsys, monkeypatch, tmp_path):
    no_work(monkeypatch)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    message = refused(capsys, "train", write_config(tmp_path))
    assert "thesis.tex" in message
    assert "run_dir" in message
    assert snapshot(tmp_path / "run") == {"thesis.tex": b"years of work"}
