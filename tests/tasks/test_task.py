"""What a config's task becomes: prompts, tokenizer and grader."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import yaml
from small_tokenizer import WORDS, save_tokenizer

from dynamo_jax.config import Config, PolicyConfig, load_config
from dynamo_jax.run.start import Start
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, ArithmeticVerifier, solve
from dynamo_jax.tasks.grading.verifier import Verifier
from dynamo_jax.tasks.read import Row
from dynamo_jax.tasks.rewards import added_reward, verdict_of
from dynamo_jax.tasks.task import build_task, build_tokenizer, build_verifier, check_golds, eval_prompts, killed_answers


def load(tmp_path: Path, seed: int = 0, **task: object) -> Config:
    path = tmp_path / "c.yaml"
    tree = {
        "run_dir": "r", "seed": seed, "policy": {"architecture": {}}, "task": task, "rollout": {"prompts": 2},
        "verifier": {"workers": 1, "timeout": 7.0, "memory_mb": 256},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


def write(path: Path, *rows: tuple[str, str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"id": p, "problem": p, "answer": a}) + "\n" for p, a in rows))
    return str(path)


# --- arithmetic

SMALL = {"train_prompts": 40, "heldout_prompts": 10, "max_operations": 3}


def test_arithmetic(tmp_path):
    task = build_task(load(tmp_path, arithmetic=SMALL))
    assert isinstance(task.verifier, ArithmeticVerifier)
    assert isinstance(task.tokenizer, ArithmeticTokenizer)
    (heldout,) = task.evals
    assert (task.train.name, heldout.name) == ("arithmetic", "heldout")
    assert (len(task.train), len(heldout)) == (40, 10)
    assert not {p.text for p in task.train.prompts} & {p.text for p in heldout.prompts}
    for prompt in task.train.prompts + heldout.prompts:
        assert prompt.id == prompt.text
        assert prompt.answer == solve(prompt.text)
        assert task.tokenizer.decode(prompt.tokens) == prompt.text
        assert len(prompt.tokens) <= 2 * SMALL["max_operations"] + 2
    assert task.verifier.grade_batch([(p.answer, p.answer) for p in task.train.prompts]) == [True] * 40


def test_arithmetic_depends_on_the_seed_alone(tmp_path):
    one, same, other = (build_task(load(tmp_path, seed, arithmetic=SMALL)) for seed in (1, 1, 2))
    assert (one.train.fingerprint, one.evals[0].fingerprint) == (same.train.fingerprint, same.evals[0].fingerprint)
    assert one.train.fingerprint != other.train.fingerprint


def test_evaluation_after_training_sees_the_same_held_out_problems(tmp_path):
    config = load(tmp_path, arithmetic=SMALL)
    (heldout,) = eval_prompts(config, build_tokenizer(config), ())
    assert heldout == build_task(config).evals[0]


def test_arithmetic_can_be_evaluated_on_a_file(tmp_path):
    config = load(tmp_path, arithmetic=SMALL, max_prompt_tokens=16)
    file = write(tmp_path / "mine.jsonl", ("3+4=", "7"), ("3*4+2=", "24"))
    (mine,) = eval_prompts(config, build_tokenizer(config), [file])
    assert [(p.text, p.answer) for p in mine.prompts] == [("3+4=", "7"), ("3*4+2=", "24")]


def test_a_file_with_other_characters_is_refused(tmp_path):
    config = load(tmp_path, arithmetic=SMALL, max_prompt_tokens=16)
    file = write(tmp_path / "mine.jsonl", ("What is 3+4?", "7"))
    with pytest.raises(ValueError, match="no token for"):
        eval_prompts(config, build_tokenizer(config), [file])


# --- math

THINKING = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant] "


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., str]:
    """Makes the folder of a small tokenizer that knows `more` words; its chat template ends with `ending`."""

    def make(ending: str, *more: str) -> str:
        return save_tokenizer(tmp_path / "model", THINKING + ending, [*WORDS, *more])

    return make


OUTPUTS = [
    (r"reasoning</think>\boxed{5}", "5"),
    (r"maybe \boxed{5}? wait", "5"),
    (r"maybe \boxed{4}? no</think> \boxed{5}", "5"),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
]


@pytest.mark.parametrize(
    ("ending", "more", "opens"),
    [
        ("<think>\n", {}, True),
        ("<think>\nOkay, ", {}, True),
        ("", {"chat_template": False, "instruction": "\nThink first.\n<think>"}, True),
        ("", {}, False),
        ("<think>\n\n</think>\n\n", {}, False),
        ("", {"instruction": " Begin with <think>"}, False),  # the assistant's turn does not begin with it
    ],
)
def test_responses_are_judged_with_the_thinking_that_their_prompts_open(tmp_path, make_tokenizer, ending, more, opens):
    files = {
        "train": [write(tmp_path / "a.jsonl", ("1+1=?", "2"))],
        "eval": [write(tmp_path / "b.jsonl", ("1=?", "1"))],
    }
    options = files | {"kind": "math", "tokenizer": make_tokenizer(ending), "max_prompt_tokens": 64} | more
    task = build_task(load(tmp_path, **options, reward={"format_bonus": 0.25}))
    assert [prompts.opens_thinking for prompts in (task.train, *task.evals)] == [opens, opens]
    with contextlib.closing(task.verifier):
        assert task.verifier.grade_batch(OUTPUTS) == [1.25, 0 if opens else 1.25, 1.25, 1.25]
        assert verdict_of(task.verifier).grade_batch(OUTPUTS) == [True, not opens, True, True]
        assert [added_reward(task.verifier, output) for output, _ in OUTPUTS] == [0.25, 0.25 * (not opens), 0.25, 0.25]
    plain = build_task(load(tmp_path, **options))
    with contextlib.closing(plain.verifier):
        assert plain.verifier.grade_batch(OUTPUTS) == [True, not opens, True, True]


def test_a_tokenizer_that_hides_the_end_of_the_thinking_is_warned_of(tmp_path, make_tokenizer, caplog):
    options = {"kind": "math", "train": [write(tmp_path / "a.jsonl", ("1 + 1 = ?", "2"))], "max_prompt_tokens": 64}
    for ending, more, warned in (("<think>", ["</think>"], 0), ("", [], 0), ("<think>", [], 1)):
        task = build_task(load(tmp_path, **options, tokenizer=make_tokenizer(ending, *more)))
        task.verifier.close()
        assert sum("its texts lack </think>" in text for text in caplog.messages) == warned


def test_the_users_reward_sees_the_thinking_that_the_prompts_open(tmp_path, make_tokenizer, monkeypatch):
    (tmp_path / "sees.py").write_text("def f(output, gold): return output.startswith('<think>')\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = write(tmp_path / "a.jsonl", ("1+1=?", "2"))
    options = {"kind": "math", "train": [file], "reward": {"kind": "sees:f"}}
    for ending, seen in (("<think>\n", [1, 1]), ("", [0, 1])):
        task = build_task(load(tmp_path, **options, tokenizer=make_tokenizer(ending), max_prompt_tokens=64))
        with contextlib.closing(task.verifier):
            assert task.verifier.grade_batch([("a", "2"), ("<think>a", "2")]) == seen


@pytest.fixture
def math_task(tmp_path: Path, shared: Path) -> dict[str, object]:
    return {
        "kind": "math",
        "tokenizer": str(shared / "data" / "qwen2.5-math-1.5b"),
        "train": [write(tmp_path / "a.jsonl", ("1+1=?", "2")), write(tmp_path / "b.jsonl", ("2+2=?", "4"))],
        "eval": [write(tmp_path / "bench" / "x.jsonl", ("3+3=?", "6")), write(tmp_path / "y.jsonl", ("4+4=?", "8"))],
        "max_prompt_tokens": 128,
    }


@pytest.mark.shared
def test_math(tmp_path, math_task):
    task = build_task(load(tmp_path, **math_task, instruction="\nBe brief."))
    assert task.train.name == "a+b"
    assert [(p.id, p.answer) for p in task.train.prompts] == [("1+1=?", "2"), ("2+2=?", "4")]
    assert [prompts.name for prompts in task.evals] == ["x", "y"]
    text = task.train.prompts[0].text
    assert "<|im_start|>user\n1+1=?\nBe brief.<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")
    # Training and evaluation write their prompts alike.
    assert task.evals[0].prompts[0].text == text.replace("1+1", "3+3")
    assert task.tokenizer.encode(text) == list(task.train.prompts[0].tokens)
    try:
        assert task.verifier.grade_batch([("so it is \\boxed{2}", "2"), ("\\boxed{3}", "2")]) == [True, False]
    finally:
        task.verifier.close()


@pytest.mark.shared
def test_problems_that_are_trained_on_and_held_out_are_told_of(tmp_path, math_task, caplog):
    write(tmp_path / "b.jsonl", ("What is 2+2?", "4"), ("5+5=?", "10"))
    row = {"id": "another", "prompt": [{"role": "user", "content": " What  is\n2+2?"}], "answer": "5"}
    (tmp_path / "y.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "again", "answer": "4"}) + "\n")
    build_task(load(tmp_path, **math_task))
    (said,) = (text for text in caplog.messages if "training data" in text)
    assert said.startswith("y: 2 of 2 held-out problems are in the training data, too")
    assert "y.jsonl, line 1 and at" in said
    assert "b.jsonl, line 1. " in said
    assert "task.allow_overlap=true" in said
    caplog.clear()
    build_task(load(tmp_path, **math_task, allow_overlap=True))
    assert "training data" not in caplog.text


@pytest.mark.shared
def test_nothing_is_told_of_files_without_common_problems(tmp_path, math_task, caplog):
    write(tmp_path / "y.jsonl", ("1 + 11=?", "12"), ("1+1 =?!", "2"))  # nearly 1+1=?, which is trained on
    build_task(load(tmp_path, **math_task))
    assert not caplog.messages


@pytest.mark.shared
def test_held_out_problems_that_are_too_long_are_told_of(tmp_path, math_task, caplog):
    write(tmp_path / "y.jsonl", ("4+4=?", "8"), ("+".join("1" * 200) + "=?", "200"))
    write(tmp_path / "b.jsonl", ("2+2=?", "4"), ("+".join("1" * 201) + "=?", "201"))  # of training it is not a score
    task = build_task(load(tmp_path, **math_task))
    assert [prompts.dropped for prompts in (task.train, *task.evals)] == [1, 0, 1]
    (said,) = (text for text in caplog.messages if "as wrong" in text)
    assert said.startswith("y: its scores count the 1 left out as wrong")


@pytest.mark.shared
def test_files_are_read_as_they_were_for_a_run_that_was_started_then(tmp_path, math_task, caplog):
    """The numbers are those of the version before."""
    write(tmp_path / "b.jsonl", ("2+2=?", '["4", "four"]'), ("3+2=?", '["5"]'))
    (tmp_path / "y.jsonl").write_text('{"problem": "1+3=?", "answer": "4"}\n' * 2)
    config = load(tmp_path, **math_task, reward={"kind": "math"})
    old = build_task(config, Start(datetime.now(), reading=1))
    assert [p.answer for p in old.train.prompts] == ["2", '["4", "four"]', '["5"]']
    assert old.fingerprints == [
        "32131e6dc89ec8a2cca9107e86ccb498d31f1fc8c818b7577ee7d4aa55791184",
        "6d069dd60a34c6e7f73f7b927bcfdafa21ba54af65ae842d7c54de1b13dc3cf8",
        "76b15eb953ed4c280a0abd98fba724db9e283c2e87e6ed4cb5ea0873b0f88819",
    ]
    assert not caplog.messages
    new = build_task(config)
    assert [p.answer for p in new.train.prompts] == ["2", '["4", "four"]', "5"]
    assert [len(prompts) for prompts in (*old.evals, *new.evals)] == [1, 2, 1, 1]
    assert eval_prompts(config, old.tokenizer, (), reading=1) == old.evals
    for task in (old, new):
        with contextlib.closing(task.verifier):
            assert task.verifier.grade_batch([("\\boxed{4}", '["4", "four"]')]) == [True]


def test_a_reward_of_the_users_own_gets_old_references_as_they_stand(tmp_path, monkeypatch):
    (tmp_path / "whole.py").write_text("def f(output, gold): return len(gold)\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = load(tmp_path, kind="math", train=["x.jsonl"], tokenizer="folder", reward={"kind": "whole:f"})
    for reading, rewards in ((1, [11, 7]), (2, [2, 3])):
        with contextlib.closing(build_verifier(config, reading=reading)) as verifier:
            assert verifier.grade_batch([("x", '["1", "22"]'), ("x", '["123"]')]) == rewards


@pytest.mark.shared
def test_the_command_line_replaces_the_benchmarks_of_the_config(tmp_path, math_task):
    config = load(tmp_path, **math_task)
    tokenizer = build_tokenizer(config)
    assert [p.name for p in eval_prompts(config, tokenizer, [])] == ["x", "y"]
    assert [p.name for p in eval_prompts(config, tokenizer, [str(tmp_path / "a.jsonl")])] == ["a"]


@pytest.mark.shared
def test_two_benchmarks_of_one_name_are_refused(tmp_path, math_task):
    config = load(tmp_path, **math_task)
    copy = write(tmp_path / "other" / "x.jsonl", ("5+5=?", "10"))
    with pytest.raises(ValueError, match="both called x"):
        eval_prompts(config, build_tokenizer(config), [copy, str(tmp_path / "bench" / "x.jsonl")])


@pytest.mark.shared
def test_a_math_task_without_benchmarks_trains(tmp_path, math_task):
    task = build_task(load(tmp_path, **math_task | {"eval": []}))
    assert task.evals == ()


def test_the_tokenizer_gets_its_settings_from_the_config(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("dynamo_jax.tasks.task.load_tokenizer", lambda folder, **rest: seen.append((folder, rest)))
    files = {"kind": "math", "train": ["x.jsonl"], "tokenizer": "folder"}
    build_tokenizer(load(tmp_path, **files))
    config = load(tmp_path, **files, chat_template_kwargs={"enable_thinking": False})
    build_tokenizer(dataclasses.replace(config, policy=PolicyConfig(load="model")), datetime(2026, 11, 27))
    assert seen == [
        ("folder", {"policy_folder": None, "chat_template_kwargs": {}, "now": None}),
        ("folder", {"policy_folder": "model", "chat_template_kwargs": {"enable_thinking": False},
                    "now": datetime(2026, 11, 27)}),
    ]  # fmt: skip


def test_the_whole_task_has_the_date_of_the_runs_start(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def build(config, now):
        raise Seen(now)

    monkeypatch.setattr("dynamo_jax.tasks.task.build_tokenizer", build)
    with pytest.raises(Seen, match="2026-11-27"):
        build_task(load(tmp_path, arithmetic=SMALL), Start(datetime(2026, 11, 27)))


def test_the_verifier_gets_its_limits_from_the_config(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("dynamo_jax.tasks.task.Verifier", lambda **limits: seen.update(limits))
    build_verifier(load(tmp_path, kind="math", train=["x.jsonl"], tokenizer="folder"))
    assert seen == {"workers": 1, "timeout": 7.0, "memory_mb": 256, "kind": "math", "killed_file": None}
    Verifier(**seen).close()  # these are its names


def test_a_reward_of_the_users_own_gets_the_limits_of_the_verifier(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("dynamo_jax.tasks.task.RewardGrader", lambda name, **limits: seen.update(limits, name=name))
    reward = {"kind": "mine:f"}
    build_verifier(load(tmp_path, kind="math", train=["x.jsonl"], tokenizer="folder", reward=reward), tmp_path / "k")
    assert seen == {"name": "mine:f", "workers": 1, "timeout": 7.0, "memory_mb": 256, "killed_file": tmp_path / "k"}


def test_references_are_looked_at_without_the_users_function(tmp_path, monkeypatch):
    monkeypatch.delattr("dynamo_jax.tasks.rewards.Pool")  # not a worker for each file
    config = load(tmp_path, kind="math", train=["x.jsonl"], tokenizer="folder", reward={"kind": "mine:f"})
    check_golds(config)([Row("a", "1+1=?", "anything", "x.jsonl, line 1")])
    with pytest.raises(ValueError, match="line 2: the reference answer is empty"):
        check_golds(config)([Row("b", "1+1=?", " ", "x.jsonl, line 2")])


def test_every_process_has_a_file_of_killed_answers(tmp_path, monkeypatch):
    """In the run's folder. In a bucket, process 0's is where it mirrors, the others' right there."""
    monkeypatch.setenv("DYNAMO_JAX_WORK_DIR", str(tmp_path / "here"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")  # nobody is asked
    config = load(tmp_path)
    files = {}
    for index in range(2):
        monkeypatch.setattr("jax.process_index", lambda index=index: index)
        for run in ("runs/a", "gs://bucket/runs/a"):
            files[run, index] = str(killed_answers(dataclasses.replace(config, run_dir=run)))
    assert files["runs/a", 0] == "runs/a/killed_answers.jsonl"
    assert files["runs/a", 1] == "runs/a/killed_answers.1.jsonl"
    assert files["gs://bucket/runs/a", 0].startswith(f"{tmp_path}/here/a-")
    assert files["gs://bucket/runs/a", 1] == "gs://bucket/runs/a/killed_answers.1.jsonl"


@pytest.mark.shared
def test_the_killed_answers_of_another_process_are_written(tmp_path, math_task, monkeypatch):
    """Process 0 wrote its own alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    (tmp_path / "fatal.py").write_text("import os\ndef f(output, gold): return os._exit(1) if output else 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    task = build_task(load(tmp_path, **math_task, reward={"kind": "fatal:f"}))
    with contextlib.closing(task.verifier):
        assert task.verifier.grade_batch([("", "1"), ("kill", "2")]) == [0, 0]
    assert [json.loads(line)["gold"] for line in (tmp_path / "r" / "killed_answers.1.jsonl").open()] == ["2"]


@pytest.mark.shared
def test_a_reference_that_nothing_can_equal_is_an_error_with_its_row(tmp_path, math_task):
    bad = "t(0,4]"
    file = write(tmp_path / "bad" / "x.jsonl", ("p", "1"), ("q", bad), ("r", bad))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: the reference answer .*Correct it.*1 more rows"):
        build_task(load(tmp_path, **math_task | {"train": [file]}))
    countdown = {"train": [file], "reward": {"kind": "countdown"}}
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: .*no countdown problem"):
        build_task(load(tmp_path, **math_task | countdown))


@pytest.mark.parametrize(
    "reward", [{"kind": "nowhere:f"}, {"length_penalty": 1.0, "length_free": 9, "length_limit": 9}]
)
def test_a_reward_that_cannot_be_made(tmp_path, reward):
    config = load(tmp_path, kind="math", train=["x.jsonl"], tokenizer="folder", reward=reward)
    with pytest.raises(ValueError, match=r"task\.reward\."):
        build_verifier(config)
