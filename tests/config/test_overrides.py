"""Overrides: a text is taken as it is written, a word makes a list of texts, all else is YAML."""

from pathlib import Path
from typing import Any

import pydantic
import pytest
from pydantic.dataclasses import dataclass

from dynamo_jax.config import Config, ConfigError, differences, dump_config, fields, load, load_config, resolved

MINIMAL = "run_dir: r\npolicy: {architecture: {}}\n"
MATH = MINIMAL + "task: {kind: math, train: [a], tokenizer: t, system_prompt: from the file}\n"


def read(folder: Path, *overrides: str, text: str = MATH) -> Config:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, *overrides: str, text: str = MATH) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, *overrides, text=text)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "a b", " before and after ", "\ttab\t", "Note: one # two", "# all", "a: b", "yes", "No", "5", "-0.5",
        "1e-6", "1E5", "0100", "1:30", "12:30:45", "0o17", "2025-01-01", "2025-13-99", "Null", "NULL", "None", "~",
        "~/x", ".nan", "true", "[x]", "[x", "{x: y}", "{", "*x", "&x y", "!x", "!!int 5", "%x", "@x", "`x`", "|", ">",
        "- x", "? x", "-x", "--x", "a=b=c", "=", ",", "---", "...", "<<", "line\nline", "line\r\nline\n",
        "é \U0001f600 \u3000答え", "it's", "'", '"', "\"a\" and \"b\"", "'a' # 'b'", '"a', "a'", r"'a\'b'", '"a\\"',
        r"\boxed{} \frac12 \theta \text{x} \\ \{ \} C:\temp", "\\", "$HOME `id` $(id) ${RUN} %s",
    ],
)  # fmt: skip
def test_a_text_is_what_is_written(tmp_path, text):
    """It is also what the resolved config reads back as, here and in any other YAML reader (`dump_config`)."""
    config = read(tmp_path, f"task.instruction={text}", f"task.system_prompt={text}")
    assert (config.task.instruction, config.task.system_prompt) == (text, text)
    assert read(tmp_path, text=dump_config(config)) == config


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r"one\ntwo", "one\ntwo"), (r"\n", "\n"), (r"\n\n x \n", "\n\n x \n"),
        (r"Box: \boxed{}.\nGo", "Box: \\boxed{}.\nGo"), (r"\\n", r"\n"), (r"x \\neq y, \\nu", r"x \neq y, \nu"),
        (r"\\\n", r"\\n"), (r"a\\b\nc\\", "a\\\\b\nc\\\\"), (r"tab\tstays", r"tab\tstays"),
        ("real\nand " r"\n", "real\nand \n"),
    ],
)  # fmt: skip
def test_backslash_n_is_a_line_break(tmp_path, written, text):
    assert read(tmp_path, f"task.instruction={written}").task.instruction == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("'x'", "x"), ('"x"', "x"), ("''", ""), ('""', ""), ("' x '", " x "), ('"x: {y} # z"', "x: {y} # z"),
        ("'it''s'", "it's"), (r'"say \"hi\""', 'say "hi"'), (r'"a\nb\tc\\n"', "a\nb\tc\\n"), (r"'a\nb'", r"a\nb"),
        ('"null"', "null"), ("'null'", "null"), ('"5"', "5"), ('"a\nb"', "a\nb"), ("'\"'", '"'), ('"\'"', "'"),
        (r'"caf\u00e9 \xe9 \U0001F600"', "café é \U0001f600"),
        (r'"In \boxed{}, \frac12 \alpha \Phi \xi \under \_."', r"In \boxed{}, \frac12 \alpha \Phi \xi \under \_."),
    ],
)  # fmt: skip
def test_one_pair_of_quotes_around_all_of_it_is_left_out(tmp_path, written, text):
    assert read(tmp_path, f"task.instruction={written}").task.instruction == text


def test_null_is_no_text(tmp_path):
    assert read(tmp_path, "task.system_prompt=null").task.system_prompt is None
    assert read(tmp_path, "task.system_prompt=").task.system_prompt == ""
    assert read(tmp_path, "logging.wandb_project=null").logging.wandb_project is None
    for key in ("task.instruction", "run_dir"):
        assert f'{key} = null: should be a text. Write it in quotes: "null".' in refusal(tmp_path, f"{key}=null")


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("a.jsonl", ["a.jsonl"]), ("my data/a.jsonl", ["my data/a.jsonl"]), ("data/*.jsonl", ["data/*.jsonl"]),
        ("*.jsonl", ["*.jsonl"]), ("a#1: b.jsonl", ["a#1: b.jsonl"]), ("{a,b}.jsonl", ["{a,b}.jsonl"]),
        ("0100", ["0100"]), ("2025", ["2025"]), ("yes", ["yes"]), ("a,b.jsonl", ["a,b.jsonl"]),
        ("'[x].jsonl'", ["[x].jsonl"]), ('"null"', ["null"]), ("gs://b/x=1.jsonl", ["gs://b/x=1.jsonl"]),
        ("[a.jsonl]", ["a.jsonl"]), ("[a.jsonl, b c.jsonl]", ["a.jsonl", "b c.jsonl"]),
        ("[data/a b.jsonl, 'c.jsonl']", ["data/a b.jsonl", "c.jsonl"]), (" [a.jsonl] ", ["a.jsonl"]),
        ("[data/*.jsonl,\n b.jsonl]", ["data/*.jsonl", "b.jsonl"]), ("[]", []),
    ],
)  # fmt: skip
def test_a_word_is_a_list_of_one_text(tmp_path, written, names):
    assert list(read(tmp_path, f"task.eval={written}").task.eval) == names


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", ["task.eval = null", "a list, such as [a, b]. Write [] for an empty one."]),
        ("null", ["task.eval = null", "Write [] for an empty one."]),
        ("[a.jsonl", ["override 'task.eval=[a.jsonl'", "not valid YAML", "goes in quotes"]),
        ("[*.jsonl]", ["not valid YAML", "goes in quotes"]),
        ("[ab]*.jsonl", ["not valid YAML", "goes in quotes"]),
        ("[a, 5]", ['task.eval.1 = 5: should be a text. Write it in quotes: "5".']),
        ("[yes]", ['task.eval.0 = yes: should be a text. Write it in quotes: "yes".']),
        ("[null]", ['task.eval.0 = null: should be a text. Write it in quotes: "null".']),
        ("[[a]]", ['task.eval.0 = ["a"]: should be a text. Write it in quotes.']),
    ],
)
def test_what_is_no_list_of_texts(tmp_path, written, words):
    message = refusal(tmp_path, f"task.eval={written}")
    assert all(word in message for word in words), message


def test_numbers_choices_and_sections_are_in_yaml(tmp_path):
    config = read(
        tmp_path, "seed= 7 # the first", "device='cpu'", "modulation={enabled: no, tau: 1e-3}",
        "trainer.mini_batch=null", "eval.k=[1, 2]", "task.reward={kind: gsm8k}", "task.arithmetic.train_prompts=0x40",
        "logging.progress=off",
    )  # fmt: skip
    assert (config.seed, config.device, config.modulation.enabled, config.modulation.tau) == (7, "cpu", False, 1e-3)
    assert (config.trainer.mini_batch, config.eval.k, config.logging.progress) == (None, (1, 2), False)
    assert (config.task.reward.kind, config.task.arithmetic.train_prompts) == ("gsm8k", 64)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer2.steps=3", "trainer2: unknown key. Did you mean 'trainer'?"),
        ("task.reword.kind=gsm8k", "task.reword: unknown key. Did you mean 'reward'?"),
        ("task.sytem_prompt=x: y", "task.sytem_prompt: unknown key. Did you mean 'system_prompt'?"),
        ("task.instruktion=x", "task.instruktion: unknown key. Did you mean 'instruction'?"),
        ("task.instruction.x=3", 'task.instruction = {"x": 3}: should be a text'),
        ("task.system_prompt.x=3", "task.system_prompt is a value, not a section"),
        ("base=", 'base = "": should be the path of a config file'),
        ("base=no: such # file.yaml", "no: such # file.yaml: no such config file"),
    ],
)
def test_keys_that_are_not_there(tmp_path, override, words):
    assert words in refusal(tmp_path, override)


def test_the_base_is_a_text(tmp_path):
    (tmp_path / "my: base # 1.yaml").write_text("seed: 9\n")
    assert read(tmp_path, f"base={tmp_path}/my: base # 1.yaml").seed == 9
    assert read(tmp_path, f"base={tmp_path}/my: base # 1.yaml", "base=null").seed == 0


# --- a setting whose keys are free


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid", strict=True))
class Free(Config):
    """A tree with a mapping of free keys in it."""

    free: dict[str, Any] = pydantic.Field(default_factory=dict)


@pytest.fixture
def _with_free(monkeypatch):
    monkeypatch.setattr(fields, "Config", Free)
    monkeypatch.setattr(load, "Config", Free)


@pytest.mark.usefixtures("_with_free")
@pytest.mark.parametrize(
    ("overrides", "free"),
    [
        (["free.thinking=false"], {"thinking": False}),
        (["free={thinking: false, depth: 3}"], {"thinking": False, "depth": 3}),
        (["free.a=1", "free.b=[x, 2.5]", "free.c=null"], {"a": 1, "b": ["x", 2.5], "c": None}),
        (["free.d=text", "free.e='5'"], {"d": "text", "e": "5"}),
        (["free.a.b=yes", "free.a.c={d: 1e-3}"], {"a": {"b": True, "c": {"d": 1e-3}}}),
        (["free={on: 1, 5: x, 2025-01-01: y}"], {"on": 1, "5": "x", "2025-01-01": "y"}), (["free={}"], {}),
    ],
)  # fmt: skip
def test_free_keys(tmp_path, overrides, free):
    config = read(tmp_path, *overrides)
    assert config.free == free
    assert type(config.free.get("thinking", False)) is bool
    assert read(tmp_path, text=dump_config(config)) == config


@pytest.mark.usefixtures("_with_free")
def test_free_keys_that_cannot_be_read(tmp_path):
    assert "free.a = 0100: 0100 reads as 64 in YAML (base 8)" in refusal(tmp_path, "free.a=0100")
    assert "free.a.1 = 1:30" in refusal(tmp_path, "free={a: [1, 1:30]}")
    assert "free = 3: should be a section of keys" in refusal(tmp_path, "free=3")
    assert "free.a is a value, not a section" in refusal(tmp_path, "free.a=1", "free.a.b=1")
    assert "fre: unknown key. Did you mean 'free'?" in refusal(tmp_path, "fre.a=1")


@pytest.mark.usefixtures("_with_free")
def test_free_keys_are_one_setting_of_a_resumed_run(tmp_path):
    one, other, none = (resolved(read(tmp_path, f"free={free}")) for free in ("{a: {b: 1}}", "{a: null}", "{}"))
    older = {key: value for key, value in none.items() if key != "free"}
    assert differences(one, one) == differences(older, none) == []
    assert differences(one, other) == ["free: {'a': {'b': 1}} -> {'a': None}"]
    assert differences(none, other) == differences(older, other) == ["free: {} -> {'a': None}"]
