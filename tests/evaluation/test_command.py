"""What is done with a finished run: `eval`, `export`, `report`, and what keeps `train` from going on with it."""

import json
import shutil
from pathlib import Path

import pytest
from command_line import MATH, compiled_once, no_work, refused, snapshot, trained, write_config
from small_runs import timeless

from dynamo_jax import cli
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer

__all__ = ["compiled_once", "trained"]  # fixtures


# --- a run folder that has a run


def test_another_config_does_not_go_on_with_the_run(capsys, monkeypatch, tmp_path, trained):
    no_work(monkeypatch)
    shutil.copytree(trained, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    message = refused(capsys, "train", write_config(tmp_path), "seed=5", "modulation.enabled=false")
    assert "seed: 0 -> 5" in message
    assert "modulation.enabled: True -> False" in message
    assert "run_dir" in message
    assert snapshot(tmp_path / "run") == before


def damaged(trained: Path, folder: Path) -> Path:
    """A copy of the run whose newest checkpoint has a flipped bit."""
    shutil.copytree(trained, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(folder)))
    victim = max((folder / "checkpoints" / "2" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return folder


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, trained):
    run_dir = damaged(trained, tmp_path / "run")
    assert cli.main(["train", str(write_config(tmp_path))]) == 0
    assert timeless(run_dir) == timeless(trained)
    assert (run_dir / "checkpoints" / "2").is_dir()  # made again
    assert list((run_dir / "checkpoints_damaged").iterdir())


@pytest.mark.parametrize("command", ["eval", "export"])
def test_checkpoints_that_cannot_be_read(capsys, tmp_path, trained, command):
    config = write_config(tmp_path)
    more = ["--samples", "2", "--json", tmp_path / "x.json"] if command == "eval" else ["--out", tmp_path / "out"]
    words = [command, config, *more]
    message = refused(capsys, *words, "--checkpoint", tmp_path / "nowhere")
    assert f"{tmp_path}/nowhere: no such folder" in message
    assert "run folder" in message
    (tmp_path / "hollow").mkdir()
    assert "holds no checkpoint" in refused(capsys, *words, "--checkpoint", tmp_path / "hollow")
    assert "holds no checkpoint" not in refused(capsys, *words, "--checkpoint", config)  # a file
    broken = damaged(trained, tmp_path / "run")
    assert "checkpoints/2: is damaged" in refused(capsys, *words, "--checkpoint", broken)
    message = refused(capsys, *words, "--checkpoint", trained, "policy.architecture.num_layers=2")
    assert f"{trained}/checkpoints/2: was saved from another model" in message
    assert "config that it was trained with" in message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["config.yaml", "hollow", "run"]


# --- eval, export, report


def test_eval_prints_its_table_and_writes_the_numbers(capsys, tmp_path, trained):
    words = ["eval", trained / "config.yaml", "--checkpoint", trained, "--samples", "4", "--k", "1", "4"]
    assert cli.main([*map(str, words), "--json", str(tmp_path / "scores.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "benchmark", "problems", "samples", "Pass@1", "Pass@4", "mean tokens", "truncated", "no answer"
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["heldout", "8", "4"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["samples"] == 4
    assert len(scores["correct"]["heldout"]) == 8
    assert scores["dropped"] == {"heldout": []}
    by_hand = sum(scores["correct"]["heldout"].values()) / (8 * 4)
    assert scores["metrics"]["eval/heldout/pass@1"] == pytest.approx(by_hand)
    assert f"| {100 * by_hand:.1f} (" in lines[2]


def test_every_name_of_a_checkpoint_and_its_export_give_the_same_scores(capsys, tmp_path, trained):
    config = str(trained / "config.yaml")
    exported = tmp_path / "exported"
    assert cli.main(["export", config, "--checkpoint", str(trained), "--out", str(exported)]) == 0
    assert capsys.readouterr().out == f"{exported}\n"
    tables = []
    for name in (trained, trained / "checkpoints", trained / "checkpoints" / "2", exported):
        assert cli.main(["eval", config, "--checkpoint", str(name), "--samples", "8"]) == 0
        tables.append(capsys.readouterr().out)
    assert len(set(tables)) == 1
    assert "Pass@8" in tables[0]


def test_an_evaluation_goes_on_where_it_was_stopped(capsys, tmp_path, trained, monkeypatch):
    words = ["eval", str(trained / "config.yaml"), "--checkpoint", str(trained), "--samples", "4", "--k", "1"]
    assert cli.main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "heldout_n4.jsonl").read_bytes()
    expected = capsys.readouterr().out
    # Stopped in the middle of a line, after two of eight problems and a part of the third.
    lines = whole.splitlines(keepends=True)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "heldout_n4.jsonl").write_bytes(b"".join(lines[:11]) + lines[11][:20])
    assert cli.main([*words, "--out", str(tmp_path / "torn")]) == 0
    assert (tmp_path / "torn" / "heldout_n4.jsonl").read_bytes() == whole
    assert capsys.readouterr().out == expected
    row = json.loads(lines[1])
    assert set(row) == {"id", "sample", "gold", "text", "tokens", "truncated", "answered", "correct"}
    message = refused(capsys, *words, "--out", tmp_path / "torn", "eval.temperature=0.5")
    assert "was drawn with temperature = 1.0" in message
    assert "--regrade" in message


def test_a_greedy_evaluation_repeats_one_response(capsys, tmp_path, trained):
    words = ["eval", str(trained / "config.yaml"), "--checkpoint", str(trained), "--samples", "3", "--k", "1"]
    assert cli.main([*words, "--out", str(tmp_path), "eval.temperature=0", "eval.top_p=0.5"]) == 0
    drawn_with, lines = sample_lines(tmp_path, "heldout")
    assert drawn_with["temperature"] == 0
    texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) == 8 * 3
    assert texts == [text for text in texts[::3] for _ in range(3)]
    assert "the 3 samples of a problem will be one response" in capsys.readouterr().err
    assert '"eval/heldout/pass@1"' in (tmp_path / "results.json").read_text()


def sample_lines(folder: Path, name: str) -> tuple[dict, list[bytes]]:
    """What a saved file says that it was drawn with, and its samples."""
    header, *lines = (folder / f"{name}_n3.jsonl").read_bytes().splitlines()
    return json.loads(header)["drawn_with"], lines


@pytest.fixture(scope="module")
def alone(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Benchmarks a and b, b evaluated alone in the folder `alone`; and the command without benchmark and folder."""
    folder = tmp_path_factory.mktemp("alone")
    for name, problems in (("a", ["1+2=", "4*5="]), ("b", [f"{i}+{i}=" for i in range(1, 8)])):
        rows = ({"id": problem, "problem": problem, "answer": "1"} for problem in problems)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(trained / "config.yaml"), "--checkpoint", str(trained), "--samples", "3", "--k", "1"]
    assert cli.main([*words, "--benchmark", str(folder / "b.jsonl"), "--out", str(folder / "alone")]) == 0
    return folder, words


def test_samples_depend_on_content_and_seed_alone(tmp_path, alone):
    folder, words = alone
    header, lines = sample_lines(folder / "alone", "b")
    assert len(lines) == 7 * 3
    shutil.copy(folder / "b.jsonl", tmp_path / "renamed.jsonl")
    files = [str(folder / "a.jsonl"), str(tmp_path / "renamed.jsonl")]
    # After another file, under another name, in pieces of another size.
    assert cli.main([*words, "--benchmark", *files, "--out", str(tmp_path), "rollout.batch=4"]) == 0
    assert sample_lines(tmp_path, "renamed") == (header, lines)
    assert cli.main([*words, "--benchmark", files[1], "--out", str(tmp_path / "seed"), "seed=1"]) == 0
    other_header, other_lines = sample_lines(tmp_path / "seed", "renamed")
    assert other_lines != lines
    assert other_header == header | {"seed": 1}


@pytest.mark.parametrize("batch", [2, 8])
def test_an_evaluation_goes_on_with_another_batch(tmp_path, alone, batch):
    folder, words = alone
    whole = (folder / "alone" / "b_n3.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "b_n3.jsonl").write_bytes(b"".join(lines[:9]))  # two of seven problems, and two samples of the third
    more = ["--benchmark", str(folder / "b.jsonl"), "--out", str(tmp_path), f"rollout.batch={batch}"]
    assert cli.main([*words, *more]) == 0
    assert (tmp_path / "b_n3.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("saved", "override", "key"),
    [
        ({"stream": None}, "logging.progress=false", "stream"),  # before samples depended on content alone
        ({}, "seed=3", "seed"),
        ({}, "policy.architecture.rope_theta=500.0", "rope_theta"),
        ({}, "policy.compute_dtype=bfloat16", "compute_dtype"),
        ({}, "rollout.max_tokens=4", "max_tokens"),
        ({"stop_ids": [0]}, "logging.progress=false", "stop_ids"),
    ],
)
def test_samples_of_other_settings_are_not_gone_on_with(capsys, tmp_path, alone, saved, override, key):
    folder, words = alone
    header, lines = sample_lines(folder / "alone", "b")
    header = {name: value for name, value in (header | saved).items() if value is not None}
    file = tmp_path / "b_n3.jsonl"
    file.write_bytes(b"\n".join([json.dumps({"drawn_with": header}).encode(), *lines[:6], b""]))
    before = file.read_bytes()
    more = ["--benchmark", folder / "b.jsonl", "--out", tmp_path, override]
    assert f"was drawn with {key} = {header.get(key)!r}" in refused(capsys, *words, *more)
    assert file.read_bytes() == before


def test_problems_that_are_too_long_are_counted_and_shown(capsys, tmp_path, alone):
    _, words = alone
    rows = [{"id": "long", "problem": "1+2+3+4=", "answer": "360"}]  # 8 tokens, and task.max_prompt_tokens = 6
    rows += [{"id": text, "problem": text, "answer": text[0]} for text in ("1+1=", "2+2=", "3+3=")]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words, "--benchmark", str(tmp_path / "some.jsonl"), "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    # As if all that could be sampled had been right.
    file = tmp_path / "out" / "some_n3.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines[1:]] == [row["id"] for row in rows[1:] for _ in range(3)]
    file.write_text("".join(json.dumps(line | {"text": line.get("gold")}) + "\n" for line in lines))
    capsys.readouterr()
    for more, problems, score, said in (
        ([], "4", 0.75, "They count as wrong"),
        (["--allow-dropped"], "3", 1.0, "left out of the scores"),
    ):
        assert cli.main([*words, "--regrade", *more]) == 0
        out = capsys.readouterr().out
        cells = [cell.strip() for cell in out.splitlines()[2].strip("|").split("|")]
        assert (cells[1], cells[3].split()[0], cells[-1]) == (problems, f"{100 * score:.1f}", "1")
        assert "some: 1 of 4 problems are longer than task.max_prompt_tokens = 6" in out
        assert said in out
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["dropped"] == {"some": ["long"]}
        assert results["metrics"]["eval/some/dropped"] == 1
        assert results["metrics"]["eval/some/pass@1"] == score
        assert sum(results["correct"]["some"].values()) == 9
        assert ("long" in results["correct"]["some"]) == (not more)


def test_regrading_samples_nothing_and_uses_the_saved_texts(capsys, tmp_path, trained, monkeypatch):
    words = ["eval", str(trained / "config.yaml"), "--checkpoint", str(trained), "--samples", "4", "--k", "1"]
    words += ["--out", str(tmp_path)]
    assert "Finish the evaluation without --regrade" in refused(capsys, *words, "--regrade")
    assert cli.main(words) == 0
    before = capsys.readouterr().out
    file = tmp_path / "heldout_n4.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[1:]:
        row["text"], row["correct"] = row["gold"], False
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("dynamo_jax.evaluation.command.make_samplers", lambda *_: pytest.fail("it sampled"))
    assert cli.main([*words, "--regrade"]) == 0
    assert "| 100.0 (100.0 to 100.0)" in (after := capsys.readouterr().out)
    assert before != after
    assert json.loads((tmp_path / "results.json").read_text())["metrics"]["eval/heldout/pass@1"] == 1.0


def test_regrading_knows_the_thinking_that_the_prompts_open(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("dynamo_jax.evaluation.command.build_tokenizer", lambda *_: ArithmeticTokenizer())
    monkeypatch.setattr(ArithmeticTokenizer, "encode", lambda _, text: [len(text)])  # of the prompts nothing is asked
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "a", "problem": "2+3=?", "answer": "5"}) + "\n")
    texts = [r"so 5</think> \boxed{5}", r"maybe \boxed{5}? wait"]
    row = {"id": "a", "gold": "5", "tokens": 1, "truncated": False, "answered": True, "correct": True}
    lines = [{"drawn_with": {}}, *(row | {"sample": i, "text": text} for i, text in enumerate(texts))]
    for instruction, answers in (("\n<think>", [True, False]), ("\nThink.", [True, True])):
        task = MATH | {"train": ["x.jsonl"], "tokenizer": "folder", "instruction": instruction}
        config = write_config(tmp_path, task=task)
        (tmp_path / "x_n2.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["eval", config, "--checkpoint", "gone", "--benchmark", tmp_path / "x.jsonl", "--samples", 2, "--k", 1]
        assert cli.main([*map(str, words), "--out", str(tmp_path), "--regrade"]) == 0
        saved = [json.loads(line) for line in (tmp_path / "x_n2.jsonl").read_text().splitlines()[1:]]
        assert [row["correct"] for row in saved] == answers
        assert [row["answered"] for row in saved] == answers
        assert [row["text"] for row in saved] == texts
        capsys.readouterr()


def test_export_keeps_what_is_there(capsys, tmp_path, trained):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("precious")
    words = ["export", trained / "config.yaml", "--checkpoint", trained, "--out"]
    message = refused(capsys, *words, tmp_path / "out")
    assert f"{tmp_path}/out: already exists" in message
    assert snapshot(tmp_path / "out") == {"model.safetensors": b"precious"}
    assert str(tmp_path / "out") in refused(capsys, *words, tmp_path / "out" / "model.safetensors" / "below")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "4", "--k", "1", "8"], ["--k 8", "--samples is 4", "Raise --samples"]),
        (["--benchmark", "nowhere.jsonl"], ["nowhere.jsonl: no such data file", "--benchmark"]),
        (["--benchmark", "a/x.jsonl", "b/x.jsonl"], ["no such data file"]),
        (["--json", "nowhere/scores.json"], ["--json nowhere/scores.json", "folder that exists"]),
        (["--json", "."], ["--json .", "is a folder"]),
    ],
)
def test_what_stops_an_evaluation_before_it_samples(capsys, monkeypatch, tmp_path, trained, words, expected):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynamo_jax.evaluation.command.make_samplers", lambda *_: pytest.fail("it sampled"))
    message = refused(capsys, "eval", trained / "config.yaml", "--checkpoint", trained, *words)
    for part in expected:
        assert part in message
    assert not list(tmp_path.iterdir())


def test_eval_of_files_needs_a_file(capsys, tmp_path):
    config = write_config(tmp_path, task=MATH | {"train": ["x.jsonl"], "tokenizer": "folder"})
    message = refused(capsys, "eval", config, "--checkpoint", tmp_path)
    assert "--benchmark" in message
    assert "task.eval" in message


def test_report_of_runs_that_are_and_are_not(capsys, tmp_path, trained):
    out = tmp_path / "x.html"
    assert cli.main(["report", str(trained), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert "<html" in out.read_text()
    before = out.read_bytes()
    assert f"{tmp_path}/none: no such run folder" in refused(capsys, "report", trained, tmp_path / "none", "--out", out)
    assert f"{tmp_path}/metrics.jsonl: no such file" in refused(capsys, "report", tmp_path, "--out", out)
    assert out.read_bytes() == before
    message = refused(capsys, "report", trained, "--out", tmp_path / "none" / "x.html")
    assert f"{tmp_path}/none/x.html: cannot be written" in message
