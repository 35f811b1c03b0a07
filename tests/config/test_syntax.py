"""What a word of a file or an override reads as, and what is said of one that reads as something else."""

import json
from pathlib import Path

import pytest
import yaml

from dynamo_jax.config import Config, ConfigError, dump_config, load_config, resolved

MINIMAL = "run_dir: r\npolicy: {architecture: {}}\n"


def read(folder: Path, text: str, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "reads", "base", "write"),
    [
        ("0100", "64", 8, "100 or 64"), ("010", "8", 8, "10 or 8"), ("0777", "511", 8, "777 or 511"),
        ("-010", "-8", 8, "-10 or -8"), ("+0_17", "15", 8, "17 or 15"), ("00", "0", 8, "0"), ("07", "7", 8, "7"),
        ("1:30", "90", 60, "90"), ("12:30:45", "45045", 60, "45045"), ("-1:30", "-90", 60, "-90"),
        ("1:30.5", "90.5", 60, "90.5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["seed", "optimizer.learning_rate", "eval.k", "policy.architecture.vocab_size"])
def test_no_number_is_read_in_base_8_or_60(tmp_path, key, written, reads, base, write):
    *parents, leaf = key.split(".")
    value = f"[1, {written}]" if leaf == "k" else written
    place = f"{key}.1" if leaf == "k" else key
    reading = f"{place} = {written}: {written} reads as {reads} in YAML (base {base})."
    says = f'c.yaml: {reading} Write {write}, or for a text in quotes: "{written}".'
    assert says in refusal(tmp_path, MINIMAL, f"{key}={value}")
    if parents[:1] != ["policy"]:
        text = f"{parents[0]}: {{{leaf}: {value}}}" if parents else f"{leaf}: {value}"
        assert says in refusal(tmp_path, f"{MINIMAL}{text}\n")


def test_all_such_numbers_are_named_at_once(tmp_path):
    lines = refusal(tmp_path, MINIMAL + "seed: 010\nwarmup: {steps: 1:30}\n", "eval.k=[01]").splitlines()
    assert [line.partition(": ")[2].split()[0] for line in lines] == ["seed", "warmup.steps", "eval.k.0"]


@pytest.mark.parametrize(
    ("written", "value"),
    [("100", 100), ("0", 0), ("1_000", 1000), ("0x10", 16), ("0b101", 5), ("+5", 5), ("5 # five", 5)],
)
def test_numbers_that_say_their_base_or_need_none(tmp_path, written, value):
    assert (
        read(tmp_path, f"{MINIMAL}seed: {written}\n").seed == read(tmp_path, MINIMAL, f"seed={written}").seed == value
    )


@pytest.mark.parametrize("written", ["0.5", "00.5", "5e-1", "05e-1", "0_0.5"])
def test_a_point_or_an_exponent_means_base_10(tmp_path, written):
    assert read(tmp_path, MINIMAL, f"rollout.top_p={written}").rollout.top_p == 0.5


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("seed='3'", 'seed = "3": should be a valid integer. Write it without quotes: 3.'),
        ("seed=08", 'seed = "08": should be a valid integer. Write 8.'),
        ("seed='0100'", 'seed = "0100": should be a valid integer. Write 100.'),
        ("seed='1:30'", "Correct it."),
        ("seed='yes'", "Correct it."),
        ("seed=three", "Correct it."),
        ("seed=0o17", "Correct it."),
        ("seed=1e3", "seed = 1000.0: should be a valid integer. Write 1000."),
        ("seed=1.5", "Correct it."),
        ("seed=1e999", "Correct it."),
        ("seed=", "seed = null: should be a valid integer. Give a value."),
        ("optimizer.learning_rate='1e-6'", "should be a valid number. Write it without quotes: 1e-6."),
        ("modulation.enabled='yes'", "should be a valid boolean. Write it without quotes: yes."),
        ("modulation.enabled='1'", "Correct it."),
        ("modulation.enabled=maybe", "Correct it."),
        ("eval.k=8", "eval.k = 8: should be a list, such as [1, 8]. Write it as [8]."),
        ("task={train: a b.jsonl}", 'should be a list, such as [a, b]. Write it as ["a b.jsonl"].'),
    ],
)
def test_errors_of_type_say_how_to_write_it(tmp_path, override, remedy):
    message = refusal(tmp_path, MINIMAL, override)
    assert message.endswith(remedy), message


BARE = ["5", "-5", "1.50", "1e-6", "1_000", "0x1F", "yes", "No", "TRUE", "off", "null", "Null", "~", ".inf"]


@pytest.mark.parametrize("word", BARE)
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run_dir", "run_dir: HERE\npolicy: {architecture: {}}\n"),
        ("task.instruction", MINIMAL + "task: {instruction: HERE}\n"),
        ("policy.load", "run_dir: r\npolicy:\n  load: HERE # a folder\n"),
    ],
)
def test_a_text_that_yaml_takes_for_something_else(tmp_path, key, text, word):
    if key == "policy.load" and word.lower() in ("null", "~"):
        assert "policy.load = null: exactly one of" in refusal(tmp_path, text.replace("HERE", word))  # it may be null
        return
    message = refusal(tmp_path, text.replace("HERE", word))
    assert message.endswith(f'c.yaml: {key} = {word}: should be a text. Write it in quotes: "{word}".')
    quoted = read(tmp_path, text.replace("HERE", f'"{word}"'))
    assert word in (quoted.run_dir, quoted.task.instruction, quoted.policy.load, "~")  # which is the home folder


def test_texts_of_other_kinds(tmp_path):
    assert 'run_dir = null: should be a text. Write it in quotes: "".' in refusal(tmp_path, "run_dir:\n")
    assert 'run_dir = ["a"]: should be a text. Write it in quotes.' in refusal(tmp_path, "run_dir: [a]\n")
    assert 'run_dir = {"a": null}: should be a text. Write it in quotes.' in refusal(tmp_path, "run_dir: {a}\n")
    assert 'task.train.1 = 2025: should be a text. Write it in quotes: "2025".' in refusal(
        tmp_path, MINIMAL + "task: {train: [a, 2025]}\n"
    )
    below = tmp_path / "below.yaml"
    below.write_text("task: {instruction: on}\n")
    assert 'task.instruction = on: should be a text. Write it in quotes: "on".' in refusal(
        tmp_path, MINIMAL + "base: below.yaml\n"
    )


@pytest.mark.parametrize("word", ["2025-01-01", "2025-1-1", "2025-01-01 10:00:00", "2025-01-01T10:00:00+02:00"])
def test_a_date_is_a_text_as_it_is_written(tmp_path, word):
    assert read(tmp_path, f"run_dir: {word}\npolicy: {{architecture: {{}}}}\n").run_dir == word


@pytest.mark.parametrize(
    "text", ["run_dir: x: y\n", 'run_dir: "\\UFFFFFFFF"\n', "run_dir: !!timestamp x\n", "run_dir: *x\n"]
)
def test_what_is_no_yaml_says_how_to_quote(tmp_path, text):
    message = refusal(tmp_path, text)
    assert "c.yaml: not valid YAML: " in message
    assert message.endswith("A text with special characters goes in quotes.")


@pytest.mark.parametrize(
    "text", ["1e-6", "1E5", ".5e3", "0100", "1:30", "yes", "null", "~", "2025-01-01", " x ", "a\n\nb ", "'", "\x85"]
)
def test_a_text_is_written_so_that_every_reader_reads_it_back(tmp_path, text):
    config = read(tmp_path, f"{MINIMAL}logging: {{wandb_project: {json.dumps(text)}}}\n")
    assert config.logging.wandb_project == text
    written = dump_config(config)
    assert read(tmp_path, written) == config
    assert yaml.safe_load(written) == resolved(config)
