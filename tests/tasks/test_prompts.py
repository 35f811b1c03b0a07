"""Rendering, filtering, batching and resuming prompts."""

import gzip
import json
import logging
import random
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizer import Characters

from dynamo_jax.batch import PromptBatch
from dynamo_jax.tasks.prompts import PromptIterator, load_prompts, make_prompt_set, pad_prompts
from dynamo_jax.tasks.read import read_rows
from dynamo_jax.tasks.tokenizer import load_tokenizer


def write_jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def load(paths, **changes):
    options = {"max_prompt_tokens": 1000, "chat_template": False, "system_prompt": None, "instruction": ""}
    return load_prompts(paths, Characters(), **(options | changes))


def numbered(n, length=lambda i: 1 + i % 5):
    """n prompts whose answers are all different and whose tokens tell their row."""
    return make_prompt_set("numbered", [(f"id{i}", f"text{i}", f"answer{i}", [i + 1] * length(i)) for i in range(n)])


def iterate(prompts, batch=4, seed=0):
    return PromptIterator(prompts, batch=batch, seed=seed, max_prompt_tokens=5, pad_id=0)


def draw(iterator, batches):
    return np.concatenate([next(iterator).index_P for _ in range(batches)]).tolist()


def assert_equal(a: PromptBatch, b: PromptBatch):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


# --- rendering and filtering


def verl_record(i):
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": f"problem {i}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(10 * i)},
        "extra_info": {"split": "train", "index": i, "answer": "worked"},
    }


def test_parquet_in_verl_layout(tmp_path):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([verl_record(i) for i in range(3)]), path)
    prompts = load(path, chat_template=True, instruction=" Think.", system_prompt="unused: the data has its own")
    assert [(p.id, p.answer) for p in prompts.prompts] == [("0", "0"), ("1", "10"), ("2", "20")]
    assert prompts.prompts[2].text == "<system>be brief<user>problem 2 Think.<assistant>"
    assert prompts.prompts[2].tokens == tuple(map(ord, prompts.prompts[2].text))

    # The same rows as JSONL are the same data.
    same = load(write_jsonl(tmp_path / "train.jsonl", *map(verl_record, range(3))), chat_template=True,
                instruction=" Think.")  # fmt: skip
    assert same.fingerprint == prompts.fingerprint


def test_verl_indices_of_several_files_do_not_collide(tmp_path):
    paths = []
    for name in ("gsm8k", "math"):
        (tmp_path / name).mkdir()
        records = [verl_record(i) | {"prompt": f"{name} {i}"} for i in range(2)]
        paths.append(write_jsonl(tmp_path / name / "train.jsonl", *records))
    assert [r.id for r in read_rows(paths)] == ["gsm8k/train/0", "gsm8k/train/1", "math/train/0", "math/train/1"]
    assert load(paths).name == "train+train"


def test_rendering(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", {"id": "a", "problem": "2+3?", "answer": "5"})
    assert load(path, instruction="\nGo.").prompts[0].text == "2+3?\nGo."
    assert load(path, chat_template=True).prompts[0].text == "<user>2+3?<assistant>"
    both = load(path, chat_template=True, system_prompt="S", instruction=" Go.")
    assert both.prompts[0].text == "<system>S<user>2+3? Go.<assistant>"
    with pytest.raises(ValueError, match=r"task\.system_prompt = 'S' needs a chat template"):
        load(path, system_prompt="S")


def test_an_empty_system_message_is_kept(tmp_path):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "2+3?"}]
    for name, prompt in (("list", messages), ("json", json.dumps(messages)), ("python", str(messages))):
        path = write_jsonl(tmp_path / f"{name}.jsonl", {"prompt": prompt, "answer": "5"})
        assert load(path, chat_template=True, system_prompt="S").prompts[0].text == "<system><user>2+3?<assistant>"
        with pytest.raises(ValueError, match=r"line 1: the prompt is a list of chat messages"):
            load(path)


def test_sets_of_folders_and_globs_have_names(tmp_path):
    (tmp_path / "bench").mkdir()
    with gzip.open(tmp_path / "bench" / "aime24.jsonl.gz", "wt") as file:
        file.write(json.dumps({"Problem": "2+3?", "Answer": 5}) + "\n")
    for path, name in (("bench/aime24.jsonl.gz", "aime24"), ("bench", "bench"), ("bench/aime*.gz", "aime")):
        assert load(tmp_path / path).name == name


def test_rows_that_stand_twice_are_one_prompt(tmp_path, caplog):
    path = write_jsonl(tmp_path / "x.jsonl", *[{"problem": "2+3?", "answer": "5"}, {"problem": "p", "answer": "5"}] * 3)
    prompts = load(path)
    assert [p.text for p in prompts.prompts] == ["2+3?", "p"]
    assert caplog.messages == ["x: 4 of 6 rows repeat the problem and the answer of another one and were left out"]
    assert len(load(path, reading=1)) == 6


def test_instruction_follows_the_last_user_message(tmp_path):
    turns = [("user", "one"), ("assistant", "1"), ("user", "two")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_jsonl(tmp_path / "x.jsonl", {"id": "a", "prompt": messages, "answer": "2"})
    text = load(path, chat_template=True, system_prompt="S", instruction=" Go.").prompts[0].text
    assert text == "<system>S<user>one<assistant>1<user>two Go.<assistant>"
    with pytest.raises(ValueError, match=r"line 1: .* chat messages, and task\.chat_template is false"):
        load(path)
    path = write_jsonl(tmp_path / "y.jsonl", {"id": "a", "prompt": messages[:2], "answer": "2"})
    with pytest.raises(ValueError, match=r"line 1: the last message must be the user's"):
        load(path, chat_template=True)


def test_long_prompts_are_dropped_counted_and_logged(tmp_path, caplog):
    path = write_jsonl(tmp_path / "x.jsonl", *({"id": i, "prompt": "a" * i, "answer": "1"} for i in range(1, 9)))
    with caplog.at_level(logging.WARNING, logger="dynamo_jax"):
        prompts = load(path, max_prompt_tokens=6)
    assert [p.id for p in prompts.prompts] == ["1", "2", "3", "4", "5", "6"]
    assert (prompts.dropped, prompts.dropped_ids) == (2, ("7", "8"))
    (record,) = caplog.records
    assert "left out 2 of 8 prompts (25.0%)" in record.getMessage()
    assert "task.max_prompt_tokens = 6" in record.getMessage()

    caplog.clear()
    assert load(path, max_prompt_tokens=8).dropped == 0
    assert not caplog.records
    with pytest.raises(ValueError, match=r"all 8 prompts .* task.max_prompt_tokens = 0; the shortest has 1 tokens"):
        load(path, max_prompt_tokens=0)


def test_fingerprint_changes_with_everything_that_is_trained_on():
    rows = [("a", "t", "1", (1, 2)), ("b", "u", "2", (3,))]
    base = make_prompt_set("x", rows).fingerprint
    assert make_prompt_set("renamed", rows, dropped_ids=["c"]).fingerprint == base
    assert make_prompt_set("x", [(*r[:3], list(np.int32(r[3]))) for r in rows]).fingerprint == base
    changed = [rows[::-1]] + [
        [(*rows[0][:i], new, *rows[0][i + 1 :]), rows[1]] for i, new in enumerate(("c", "v", "3", (1,)))
    ]
    assert len({base, *(make_prompt_set("x", r).fingerprint for r in changed)}) == 6
    for bad, message in (
        ([], "no prompts"),
        (rows[:1] * 2, "id 'a' occurs twice"),
        ([("a", "t", "1", ())], "no tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            make_prompt_set("x", bad)


# --- batches


def test_left_padding():
    prompts = make_prompt_set("x", [("a", "t", "1", [5, 6]), ("b", "u", "2", [7]), ("c", "v", "3", [8, 9, 10])]).prompts
    batch = pad_prompts(prompts, 3, pad_id=99, index=[4, 0, 2])
    assert batch.tokens_PL.tolist() == [[99, 5, 6], [99, 99, 7], [8, 9, 10]]
    assert batch.length_P.tolist() == [2, 1, 3]
    assert batch.index_P.tolist() == [4, 0, 2]
    assert {a.dtype for a in batch[:3]} == {np.dtype("int32")}
    assert batch[3:] == (("a", "b", "c"), ("t", "u", "v"), ("1", "2", "3"))
    assert pad_prompts(prompts[1:], 4, pad_id=0).index_P.tolist() == [0, 1]
    with pytest.raises(ValueError, match="prompt 'c' has 3 tokens, and max_prompt_tokens = 2"):
        pad_prompts(prompts, 2, pad_id=0)


def test_order_is_a_new_permutation_each_epoch_and_each_seed():
    prompts = numbered(20)
    order = draw(iterate(prompts), 15)
    epochs = [order[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(20))}) == 4
    assert draw(iterate(prompts), 15) == order
    assert draw(iterate(prompts, seed=1), 15) != order
    # Not of the batch size either: 7 does not divide 20, so batches run on across the end of an epoch.
    assert draw(iterate(prompts, batch=7), 8) == order[:56]
    assert draw(iterate(prompts, batch=1), 60) == order


def test_too_few_prompts():
    with pytest.raises(ValueError, match=r"has 3 prompts .* a batch takes 4\. Set rollout\.prompts to at most 3"):
        iterate(numbered(3))


@pytest.mark.parametrize("seed", range(5))
def test_resume_goes_on_exactly(seed):
    rng = random.Random(seed)  # noqa: S311
    n = rng.randint(6, 40)
    prompts, batch, k = numbered(n), rng.randint(1, 6), rng.randint(0, 30)
    straight = iterate(prompts, batch, seed)
    for _ in range(k):
        next(straight)
    state = json.loads(json.dumps(straight.state()))
    resumed = iterate(prompts, batch, seed)
    draw(resumed, rng.randint(1, 5))  # wherever it stood before
    resumed.restore(state)
    assert resumed.state() == state
    for _ in range(20):
        assert_equal(next(straight), next(resumed))
    assert resumed.state() == straight.state() != state


def test_resume_in_another_process():
    code = """
import json, sys
from dynamo_jax.tasks.prompts import PromptIterator, make_prompt_set
rows = [(f"id{i}", f"text{i}", f"answer{i}", [i + 1] * (1 + i % 5)) for i in range(11)]
it = PromptIterator(make_prompt_set("numbered", rows), batch=4, seed=3, max_prompt_tokens=5, pad_id=0)
assert "transformers" not in sys.modules, "importing prompts must not import transformers"
it.restore(json.loads(sys.argv[1]))
json.dump([next(it).index_P.tolist() for _ in range(6)], sys.stdout)
"""
    straight = iterate(numbered(11), seed=3)
    draw(straight, 5)
    command = [sys.executable, "-c", code, json.dumps(straight.state())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [next(straight).index_P.tolist() for _ in range(6)]


def test_a_position_of_other_data_or_settings_is_refused():
    state = iterate(numbered(20)).state()
    for other, message in (
        (iterate(numbered(20), seed=1), "has seed = 0, this run has 1"),
        (iterate(numbered(20), batch=5), "has batch = 4, this run has 5"),
        (iterate(numbered(21)), "has fingerprint = "),
    ):
        with pytest.raises(ValueError, match=message):
            other.restore(state)
    for position in (None, "3", -1, True):
        with pytest.raises(ValueError, match="not a batch number"):
            iterate(numbered(20)).restore(state | {"next_batch": position})


@pytest.mark.parametrize("seed", range(3))
def test_a_row_stays_together_over_epochs_and_after_resume(seed):
    prompts = numbered(37)
    iterator = iterate(prompts, batch=6, seed=seed)
    for step in range(30):  # almost five epochs
        if step % 7 == 3:
            state = json.loads(json.dumps(iterator.state()))
            iterator = iterate(prompts, batch=6, seed=seed)
            iterator.restore(state)
        batch = next(iterator)
        for p, i in enumerate(batch.index_P.tolist()):
            assert (batch.ids[p], batch.texts[p], batch.answers[p]) == (f"id{i}", f"text{i}", f"answer{i}")
            length = int(batch.length_P[p])
            assert length == 1 + i % 5
            assert batch.tokens_PL[p].tolist() == [0] * (5 - length) + [i + 1] * length


# --- the real thing


@pytest.mark.shared
def test_gsm8k_with_the_qwen_tokenizer(shared):
    tokenizer = load_tokenizer(shared / "data/qwen2.5-math-1.5b")
    prompts = load_prompts(
        shared / "data/gsm8k_train.jsonl", tokenizer, max_prompt_tokens=128, chat_template=True,
        system_prompt=None, instruction="",
    )  # fmt: skip
    assert prompts.name == "gsm8k_train"
    assert len(prompts) + prompts.dropped == 7473
    assert 0 < prompts.dropped < 1000
    first = prompts.prompts[0]
    assert (first.id, first.answer) == ("gsm8k/train/0", "18")
    assert first.text == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nIn 6 months Bella and Bob will be celebrating their 4th anniversary.  How many months ago "
        "did they celebrate their 2nd anniversary?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(first.text) == list(first.tokens)
    assert first.tokens.count(tokenizer.encode("<|im_start|>")[0]) == 3
