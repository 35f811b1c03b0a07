"""Runs that were started before files were read as they are now go on with the rows that they had.

What is expected here was recorded from the version before.
"""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_tokenizer import Characters

from dynamo_jax.tasks.first_reading import first_rows
from dynamo_jax.tasks.prompts import load_prompts
from dynamo_jax.tasks.read import read_rows


def written(folder):
    """A JSONL and a Parquet file, with rows that are read otherwise now."""
    chat = [{"role": "system", "content": "brief"}, {"role": "user", "content": "1+1?"}]
    lines = [
        {"problem": "2+3?", "answer": "5"},
        {"problem": "2+3?", "answer": "5"},
        {"problem": "2+3?", "answer": 5.0},
        {"id": 7, "problem": "2+3?", "answer": "5"},
        {"id": "8", "prompt": "2+3?", "problem": "ignored", "answer": None, "ground_truth": "5"},
        {"question": "a list", "answer": '["10000", "10,000"]', "ID": "unseen", "uuid": "unseen"},
        {"question": "one", "answer": '["A"]'},
        {"question": "python", "answer": "['5']"},
        {"question": "empty", "answer": "[]"},
        {"prompt": json.dumps(chat), "answer": "2"},
        {"prompt": chat, "answer": "2"},
        {"prompt": str(chat), "answer": "1e-7"},
        {"prompt": "worked", "answer": "3*4=12\n#### 1,200", "solution": "\\boxed{7}", "Problem": "ignored"},
        {"prompt": "tiny", "answer": 1e-7},
        {"extra_info": {"index": 3}, "prompt": "verl", "reward_model": {"ground_truth": "(1,2)"}},
        {"extra_info.index": 4, "reward_model.ground_truth": "6", "prompt": "flat", "answer": "4"},
    ]
    jsonl = folder / "rows.jsonl"
    text = "".join(json.dumps(line) + "\r\n\n" for line in lines)
    jsonl.write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = pa.table({
        "problem": pa.array(["a", "b", "c", "c"]),
        "data_source": pa.array(["x", "y", "x", "y"]),
        "answer": pa.array([0.1, 2.0, None, None], pa.float32()),
        "reward_model": pa.array([{"ground_truth": v} for v in (9.0, 9.0, 1 / 3, 1 / 3)],
                                 pa.struct([("ground_truth", pa.float32())])),
        "extra_info": pa.array([{"index": i} for i in range(4)]),
    })  # fmt: skip
    (folder / "verl").mkdir()
    parquet = folder / "verl" / "train.parquet"
    pq.write_table(table, parquet)
    return [jsonl, parquet]


IDS = [
    "1e9b6b625695adb3", "1e9b6b625695adb3#2", "1e9b6b625695adb3#3", "7", "8", "5e1371a2c49d7065", "1dbb1f45c49461ee",
    "80cdf1ff6cce0334", "5a99ecfb3064334f", "a6b172cf51eb4f1d", "6311abf6f8469f42", "652419743e05549a",
    "fc4c1f2201f0b01e", "1152e0e6f206e911", "FOLDER/rows/3", "6f3eaf00d1899c51",
    "verl/train/0", "verl/train/1", "verl/train/2", "verl/train/3",
]  # fmt: skip
ANSWERS = [
    "5", "5", "5", "5", "5", '["10000", "10,000"]', '["A"]', "['5']", "[]", "2", "2", "1e-7", "1200", "0.0000001",
    "(1,2)", "4", "0.10000000149011612", "2", "0.3333333432674408", "0.3333333432674408",
]  # fmt: skip
DIGEST = "34ff85f27e23a9bc67a29334b225dffdeb5be0c6c74a5a4081e64d292b81020c"
FINGERPRINT = "b5148926d438c155994a4f42b1c4dfa4cdc0f7843d21680fa782890b63443003"


def digest(rows):
    return hashlib.sha256(json.dumps([[row.id, row.prompt, row.answer] for row in rows]).encode()).hexdigest()


def test_the_first_reading_gives_the_rows_that_it_gave(tmp_path, caplog):
    paths = written(tmp_path)
    rows = read_rows(paths, reading=1)
    assert [row.id.replace(tmp_path.name, "FOLDER") for row in rows] == IDS
    assert [row.answer for row in rows] == ANSWERS
    assert rows[1].where == f"{paths[0]}, line 3"
    assert rows[-1].where == f"{paths[1]}, row 4"
    one = read_rows(paths[1:], reading=1)
    assert [row.id for row in one] == ["0", "1", "2", "3"]
    assert digest(one) == DIGEST
    assert not caplog.messages


def test_prompts_of_the_first_reading_have_the_fingerprint_that_they_had(tmp_path):
    options = {"max_prompt_tokens": 1000, "chat_template": True, "system_prompt": "S", "instruction": " Go."}
    paths = written(tmp_path)
    prompts = load_prompts(paths[0], Characters(), **options, reading=1)
    assert prompts.name == "rows"
    assert prompts.fingerprint == FINGERPRINT
    assert load_prompts(paths, Characters(), **options, reading=1).name == "rows+train"


def test_ids_that_are_used_twice_stay_an_error(tmp_path):
    for name, problem in (("a", "p"), ("b", "q")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": "x", "problem": problem, "answer": "5"}) + "\n")
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: id 'x' is already the id of .*a\.jsonl, line 1\."):
        read_rows(paths, reading=1)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.jsonl: has no rows"):
        list(first_rows([tmp_path / "none.jsonl"]))


def test_other_readings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="reading = 3: this version reads files as 1 and 2 do"):
        read_rows(written(tmp_path), reading=3)
