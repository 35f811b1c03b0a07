"""`~` is the home folder wherever a path is a setting or a word of the command line."""

import os
import pwd
from pathlib import Path

import pytest

from dynamo_jax import cli
from dynamo_jax.config import ConfigError, at_home, differences, dump_config, load_config, resolved

MINIMAL = "run_dir: r\npolicy: {architecture: {}}\ntask: {kind: math, train: [a], tokenizer: t}\n"
ME = pwd.getpwuid(os.getuid())


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def read(folder: Path, *overrides: str, text: str = MINIMAL) -> dict:
    path = folder / "c.yaml"
    path.write_text(text)
    return resolved(load_config(path, overrides))


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("~", "{home}"), ("~/", "{home}/"), ("~/a b/c.jsonl", "{home}/a b/c.jsonl"), ("~/../x", "{home}/../x"),
        (f"~{ME.pw_name}/x", f"{ME.pw_dir}/x"), ("./~", "./~"), ("./~/x", "./~/x"), ("x/~/y", "x/~/y"), ("x~", "x~"),
        ("gs://bucket/~/x", "gs://bucket/~/x"), ("/~/x", "/~/x"), (" ~/x", " ~/x"),
    ],
)  # fmt: skip
def test_every_setting_of_a_path(tmp_path, home, path, found):
    found = found.format(home=home)
    tree = read(tmp_path, f"run_dir={path}", f"task.train={path}", f"task.eval=[b, '{path}']", f"task.tokenizer={path}")
    task = tree["task"]
    assert (tree["run_dir"], task["train"], task["eval"], task["tokenizer"]) == (found, [found], ["b", found], found)
    tree = read(tmp_path, f"policy.load={path}", "policy.architecture=null")
    assert tree["policy"]["load"] == found
    text = f'run_dir: "{path}"\npolicy: {{load: "{path}"}}\ntask: {{kind: math, train: ["{path}"], tokenizer: t}}\n'
    tree = read(tmp_path, text=text)
    assert (tree["run_dir"], tree["policy"]["load"], tree["task"]["train"]) == (found, found, [found])


def test_texts_that_are_no_paths_keep_theirs(tmp_path):
    tree = read(tmp_path, "task.instruction=~/x", "task.system_prompt=~", "logging.wandb_project=~me")
    assert (tree["task"]["instruction"], tree["task"]["system_prompt"]) == ("~/x", "~")
    assert tree["logging"]["wandb_project"] == "~me"


def test_the_base(tmp_path, home):
    (home / "base.yaml").write_text("seed: 7\nbase: ~/below.yaml\n")
    (home / "below.yaml").write_text("warmup: {batch: 3}\n")
    for tree in (read(tmp_path, "base=~/base.yaml"), read(tmp_path, text=f"{MINIMAL}base: ~/base.yaml\n")):
        assert (tree["seed"], tree["warmup"]["batch"]) == (7, 3)


@pytest.mark.parametrize(
    "override",
    ["run_dir=~nobody_here/x", "task.train=[a, ~nobody_here/x]", "policy.load=~nobody_here", "base=~nobody_here/x"],
)
def test_a_home_that_is_not_known(tmp_path, override):
    with pytest.raises(ConfigError, match=r"no such home folder .*Write \./~nobody_here\S* for a file of that name\.$"):
        read(tmp_path, override)


def test_a_resumed_run_may_name_it_either_way(tmp_path, home):
    overrides = ("task.train=[~/a, b]", "task.tokenizer=~/t", "run_dir=~/r")
    new = read(tmp_path, *overrides)
    written = dump_config(load_config(tmp_path / "c.yaml", overrides))
    assert read(tmp_path, text=written) == new  # of the run folder: whole paths
    assert differences(new, read(tmp_path, f"task.train=[{home}/a, b]", f"task.tokenizer={home}/t")) == []
    # An older version kept them as they were given.
    task = new["task"] | {"train": ["~/a", "b"], "tokenizer": "~/t"}
    older = new | {"run_dir": "~/r", "task": task}
    assert differences(older, new) == []
    assert differences(older | {"task": task | {"train": ["~nobody_here/a"]}}, new) == [
        f"task.train: ['~nobody_here/a'] -> ['{home}/a', 'b']"
    ]
    assert differences(older | {"task": task | {"tokenizer": "~/other"}}, new) == [
        f"task.tokenizer: '{home}/other' -> '{home}/t'"
    ]
    # A text is no path.
    told = new | {"task": new["task"] | {"instruction": "~/a"}}
    assert differences(told, new | {"task": new["task"] | {"instruction": f"{home}/a"}}) != []


def test_words_of_the_command_line(monkeypatch, home):
    seen = []
    monkeypatch.setattr(cli, "load_config", lambda path, overrides: seen.append(path))
    monkeypatch.setattr(
        "dynamo_jax.evaluation.command.eval_command",
        lambda *arguments, **_: seen.append(arguments[1:3] + arguments[5:7]),
    )
    words = ["--checkpoint=~/run", "--benchmark", "~/b", "x/~", "--json=~/j", "--out=~/o"]
    assert cli.main(["eval", "~/c.yaml", *words]) == 0
    assert seen == [home / "c.yaml", (home / "run", [f"{home}/b", "x/~"], home / "j", home / "o")]
    monkeypatch.setattr("dynamo_jax.report.write_report", lambda runs, out: seen.append((runs, out)))
    assert cli.main(["report", "~/r", "./~", "--out=~/p.html"]) == 0
    assert seen[2] == ([home / "r", Path("./~")], home / "p.html")


def test_a_word_with_a_home_that_is_not_known(capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "r", "--out=~nobody_here/x.html"])
    assert "argument --out: no such home folder is known here. Write ./~nobody_here/x.html" in capsys.readouterr().err


def test_no_home_at_all(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match=r"Write \./~/x for a file"):
        at_home("~/x")
