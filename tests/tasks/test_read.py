"""Rows, ids, rows that stand twice, and errors that name the file and the line."""

import itertools
import json
import logging
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynamo_jax.tasks.read import read_rows


def write_jsonl(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


# --- layouts


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"id": "a", "prompt": "2+3?", "answer": "5"}, ("a", "2+3?", "5")),
        ({"id": "a", "problem": "2+3?", "answer": "5", "source": "x"}, ("a", "2+3?", "5")),
        ({"id": "a", "question": "2+3?", "ground_truth": "5"}, ("a", "2+3?", "5")),
        ({"id": 7, "prompt": None, "problem": "2+3?", "answer": " 5\n"}, ("7", "2+3?", "5")),
        ({"extra_info": {"index": 0}, "prompt": "2+3?", "reward_model": {"ground_truth": "5"}}, ("0", "2+3?", "5")),
        ({"id": "a", "prompt": [{"role": "user", "content": "2+3?", "name": None}], "answer": "5"},
         ("a", ({"role": "user", "content": "2+3?"},), "5")),
        ({"id": "a", "prompt": "p", "answer": 18}, ("a", "p", "18")),
        ({"id": "a", "prompt": "p", "answer": 0}, ("a", "p", "0")),
        ({"id": "a", "prompt": "p", "answer": 18.0}, ("a", "p", "18")),
        ({"id": "a", "prompt": "p", "answer": 0.5}, ("a", "p", "0.5")),
        ({"id": "a", "prompt": "p", "answer": 1e-7}, ("a", "p", "0.0000001")),
        ({"id": "a", "prompt": "p", "answer": "48/2 = <<48/2=24>>24\n#### 1,024"}, ("a", "p", "1024")),
        ({"id": "a", "prompt": "p", "answer": "(1,024)"}, ("a", "p", "(1,024)")),
    ],
)  # fmt: skip
def test_row_layouts(tmp_path, record, expected):
    (row,) = read_rows([write_jsonl(tmp_path / "x.jsonl", record)])
    assert (row.id, row.prompt, row.answer) == expected


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1, "prompt": "a\xe2\x80\xa8b", "answer": "1"}\r\n\r\n  \n'
                     b'{"id": 2, "prompt": "c", "answer": "2"}')  # fmt: skip
    rows = read_rows([path])
    assert [(r.id, r.prompt, r.where) for r in rows] == [
        ("1", "a\u2028b", f"{path}, line 1"),  # a line separator inside a text ends no line
        ("2", "c", f"{path}, line 4"),
    ]


def test_hash_ids_do_not_depend_on_the_order(tmp_path):
    records = [{"prompt": f"p{i}", "answer": str(i)} for i in range(5)] + [{"prompt": "p0", "answer": "1"}]
    forward = read_rows([write_jsonl(tmp_path / "a.jsonl", *records)])
    backward = read_rows([write_jsonl(tmp_path / "b.jsonl", *records[::-1])])
    assert {r.id: (r.prompt, r.answer) for r in forward} == {r.id: (r.prompt, r.answer) for r in backward}
    assert len({r.id for r in forward}) == 6
    assert forward[0].id == "a92fa65530839e42"  # as it always was


def test_columns_of_folder_names_are_not_read(tmp_path):
    folder = tmp_path / "answer=9"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1], "prompt": ["p"]}), folder / "x.parquet")
    with pytest.raises(ValueError, match="row 1: has no answer"):
        read_rows([folder / "x.parquet"])


# --- rows that stand twice

P, Q, R = ({"problem": f"{name}?", "answer": name} for name in "pqr")


def said(caplog):
    """What was logged of rows that stand twice."""
    return [text for text in caplog.messages if "repeat" in text]


@pytest.mark.parametrize(
    ("records", "ids"),
    [
        ([P, Q, P, P], [None, None]),
        ([P | {"id": "a"}, Q | {"id": "b"}, P | {"id": "a"}], ["a", "b"]),
        ([P | {"id": 1}, P | {"id": "1"}], ["1"]),
        ([P, P | {"id": "mine-and-longer-than-a-hash"}], ["mine-and-longer-than-a-hash"]),  # given before computed
        ([P | {"id": "b"}, P | {"id": "a"}], ["a"]),
        ([P | {"id": "10"}, P | {"id": "9"}], ["9"]),
        ([P | {"id": "a"}, Q | {"id": "a", "data_source": "s"}, P | {"id": "b"}], ["a", "s/a"]),
        ([P | {"answer": 3}, P | {"answer": 3.0}, P | {"answer": " 3 "}, P | {"answer": "#### 3"}], [None]),
        ([P | {"answer": ["3"]}, P | {"answer": "3"}, P | {"answer": "['3']"}, P | {"answer": '["3"]'}], [None]),
        ([P | {"level": 1}, P | {"level": 2, "source": "elsewhere"}], [None]),
    ],
)
def test_equal_rows_are_read_once_and_counted(tmp_path, caplog, records, ids):
    for order, records_in_order in enumerate((records, records[::-1])):
        caplog.clear()
        rows = read_rows([write_jsonl(tmp_path / f"{order}.jsonl", *records_in_order)])
        assert sorted(r.id for r in rows if len(r.id) != 16 or r.id in ids) == sorted(filter(None, ids))
        assert len(rows) == len(ids)
        left_out = len(records) - len(ids)
        assert said(caplog) == [f"{order}: {left_out} of {len(records)} rows repeat the problem and the answer of "
                                "another one and were left out"]  # fmt: skip


def test_the_first_of_equal_rows_keeps_its_place(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", Q, P, Q, R, P)
    assert [(r.prompt, r.where.rpartition(", ")[2]) for r in read_rows([path])] == [
        ("q?", "line 1"), ("p?", "line 2"), ("r?", "line 4")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "records", [[P, Q], [P, P | {"answer": "5"}], [P, P | {"problem": "p? "}], [P, P | {"answer": "P"}]]
)
def test_different_rows_are_all_read(tmp_path, caplog, records):
    assert len(read_rows([write_jsonl(tmp_path / "x.jsonl", *records)])) == 2
    assert not said(caplog)


def test_equal_rows_of_several_files_are_read_once(tmp_path, caplog):
    a = write_jsonl(tmp_path / "a.jsonl", P | {"id": "a"}, Q)
    b = tmp_path / "b.parquet"
    pq.write_table(pa.Table.from_pylist([Q, P | {"problem": "new?"}, P]), b)
    with caplog.at_level(logging.INFO, logger="dynamo_jax"):
        rows = read_rows([a, b])
    assert [(r.prompt, r.where.rpartition("/")[2]) for r in rows] == [
        ("p?", "a.jsonl, line 1"), ("q?", "a.jsonl, line 2"), ("new?", "b.parquet, row 2")
    ]  # fmt: skip
    assert caplog.messages == ["a+b: 2 of 5 rows repeat the problem and the answer of another one and were left out"]


def test_copies_take_no_memory(tmp_path, monkeypatch):
    """DAPO-Math-17k has 1.8 million rows of 17 thousand problems."""
    monkeypatch.setattr("dynamo_jax.tasks.files.BATCH", 100)
    chat = [{"role": "user", "content": "Solve it step by step. " * 20}]
    record = {"prompt": chat, "reward_model": {"ground_truth": "34"}, "extra_info": {"index": "9a9b6eb4-a1cb-49d1"}}
    pq.write_table(pa.Table.from_pylist([record] * 2000), tmp_path / "x.parquet")
    tracemalloc.start()
    try:
        (row,) = read_rows([tmp_path / "x.parquet"])
        assert tracemalloc.get_traced_memory()[1] < 2**20  # all at once: 3 MiB and more
    finally:
        tracemalloc.stop()
    assert (row.id, row.answer) == ("9a9b6eb4-a1cb-49d1", "34")


# --- ids of several files and sources


def test_an_id_of_different_problems_is_told_apart_by_the_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a = write_jsonl(tmp_path / "a/train.jsonl", P | {"id": "1"}, Q | {"id": "2"})
    b = write_jsonl(
        tmp_path / "b/train.jsonl", R | {"id": "1"}, Q | {"id": "2", "answer": "new"}, R | {"id": 3, "answer": 3}
    )
    expected = {"p": "a/train/1", "q": "a/train/2", "r": "b/train/1", "new": "b/train/2", "3": "3"}
    assert {r.answer: r.id for r in read_rows([a, b])} == expected
    assert {r.answer: r.id for r in read_rows([b, a])} == expected
    assert {r.answer: r.id for r in read_rows([tmp_path])} == expected
    assert [r.id for r in read_rows([a])] == ["1", "2"]


def test_an_id_of_different_problems_is_told_apart_by_the_source(tmp_path):
    records = [P | {"id": "1", "data_source": "gsm8k"}, Q | {"id": "1", "data_source": "math"}, R | {"id": 2}]
    expected = {"p": "gsm8k/1", "q": "math/1", "r": "2"}
    for order in itertools.permutations(records):
        assert {r.answer: r.id for r in read_rows([write_jsonl(tmp_path / "x.jsonl", *order)])} == expected
    verl = [
        {"prompt": source, "reward_model": {"ground_truth": "5"}, "extra_info": {"index": 0}, "data_source": source}
        for source in ("train-math-olympiads", "train-math-aops")
    ]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(verl), path)
    assert [r.id for r in read_rows([path])] == ["train-math-olympiads/0", "train-math-aops/0"]


def test_an_id_is_told_apart_by_file_and_source_where_it_takes_both(tmp_path):
    paths = []
    for place in ("x/gsm8k", "y/gsm8k"):
        (tmp_path / place).mkdir(parents=True)
        records = [{"problem": f"{place} {s}", "answer": "5", "id": 1, "data_source": s} for s in ("s", "t")]
        paths.append(write_jsonl(tmp_path / place / "train.jsonl", *records))
    assert [r.id for r in read_rows(paths)] == [
        f"{place}/gsm8k/train.jsonl/{s}/1" for place in ("x", "y") for s in ("s", "t")
    ]


@pytest.mark.parametrize(
    "second",
    [
        Q | {"id": "1"},
        Q | {"id": 1},
        Q | {"id": "1", "data_source": "s"},
        P | {"id": "1", "answer": "other", "data_source": "s"},
    ],
)
def test_an_id_of_different_problems_of_one_source_is_an_error(tmp_path, second):
    source = {"data_source": second["data_source"]} if "data_source" in second else {}
    a = write_jsonl(tmp_path / "a.jsonl", P | {"id": "1"} | source, R, second)
    b = write_jsonl(tmp_path / "b.jsonl", R | {"answer": "7"})
    for paths in ([a], [a, b]):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 3: id '1' is already the id of .*a\.jsonl, line 1\."):
            read_rows(paths)


def test_ids_of_equal_rows_do_not_depend_on_the_order(tmp_path):
    """Which file and source an id is told apart by, neither."""
    records = [P | {"id": 1, "data_source": s} for s in ("b", "a")] + [Q | {"id": 1, "data_source": "c"}, R | {"id": 2}]
    for order in itertools.permutations(records):
        rows = read_rows([write_jsonl(tmp_path / "x.jsonl", *order)])
        assert {r.answer: r.id for r in rows} == {"p": "a/1", "q": "c/1", "r": "2"}
    files = [write_jsonl(tmp_path / f"{name}.jsonl", *these)
             for name, these in (("a", [P | {"id": 1}]), ("b", [Q | {"id": 1}, P | {"id": 1}]))]  # fmt: skip
    folder = tmp_path.name
    for paths in (files, files[::-1]):
        assert {r.answer: r.id for r in read_rows(paths)} == {"p": f"{folder}/a/1", "q": f"{folder}/b/1"}


def test_an_id_that_looks_like_another_one_told_apart_is_an_error(tmp_path):
    records = [P | {"id": "1", "data_source": "s"}, Q | {"id": "1", "data_source": "t"}, R | {"id": "s/1"}]
    with pytest.raises(ValueError, match=r"line 3: id 's/1' is already the id of .*line 1\."):
        read_rows([write_jsonl(tmp_path / "x.jsonl", *records)])


# --- errors


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "p", ', "is not valid JSON"),
        ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1, 2]", "is a JSON list, not an object"),
        ({"answer": "5"}, "has no prompt: none of the keys prompt, problem, question .* row: answer"),
        ({"prompt": "p"}, r"has no answer: none of the keys answer, ground_truth, reward_model\.ground_truth"),
        ({"prompt": "p", "answer": None}, "has no answer"),
        ({"prompt": "p", "reward_model": "5"}, "has no answer"),
        ({"prompt": " ", "answer": "5"}, "prompt is empty"),
        ({"prompt": "p", "answer": ""}, "answer is empty"),
        ({"prompt": "p", "answer": "worked\n####  "}, "answer has nothing after its last ####"),
        ({"prompt": 5, "answer": "5"}, "prompt = 5 is a int. Make it a text or a list of chat messages"),
        ({"problem": "p", "answer": {"a": 5}}, r"answer = \{'a': 5\} is a dict. Make it a text or a number"),
        ({"problem": "p", "answer": True}, "answer = True is a bool"),
        ('{"problem": "p", "answer": NaN}', "answer = nan is not a number"),
        ({"problem": "p", "answer": "\ud800"}, "answer holds half of a surrogate pair"),
        ({"id": 1.5, "problem": "p", "answer": "5"}, "id = 1.5 is a float"),
        ({"id": "", "problem": "p", "answer": "5"}, "id is empty"),
        ({"prompt": [], "answer": "5"}, "prompt is an empty list"),
        ({"prompt": ["hi"], "answer": "5"}, r"prompt\[0\] = 'hi' is not a message"),
        ({"prompt": [{"role": "user"}], "answer": "5"}, r"prompt\[0\].content = None is a NoneType"),
        ({"prompt": [{"role": "system", "content": "x"}], "answer": "5"}, "no message with the role 'user'"),
    ],
)
def test_bad_row_names_file_and_line(tmp_path, bad, message):
    path = write_jsonl(tmp_path / "x.jsonl", {"id": "ok", "prompt": "p", "answer": "5"}, "", bad)
    with pytest.raises(ValueError, match=message) as error:
        read_rows([path])
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert "\n" not in str(error.value)


def test_line_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "p", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: is not UTF-8"):
        read_rows([path])


def test_a_file_that_is_listed_twice(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", {"id": "x", "prompt": "p", "answer": "5"})
    for again in (tmp_path / "." / "a.jsonl", tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="is listed twice"):
            read_rows([a, again])


def test_bad_files(tmp_path):
    def message(path):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
            read_rows([path])
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such data file" in message(tmp_path / "missing.jsonl")
    assert "has no rows" in message(write_jsonl(tmp_path / "empty.jsonl"))
    assert "has no rows" in message(write_jsonl(tmp_path / "blank.jsonl", "", " "))
    assert "unknown kind of data file '.csv'" in message(write_jsonl(tmp_path / "x.csv", "a,b"))
    assert "cannot be read as Parquet" in message(write_jsonl(tmp_path / "text.parquet", "not parquet"))

    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.table({"prompt": ["p"] * 3, "answer": ["5", None, "6"]}), whole)
    assert "row 2: has no answer" in message(whole)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-20])
    assert "cannot be read as Parquet" in message(cut)
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1" + b"\xff" * 60 + whole.read_bytes()[64:])
    assert "cannot be read as Parquet" in message(damaged)
    none = tmp_path / "none.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), none)
    assert "has no rows" in message(none)
    with pytest.raises(ValueError, match="no data file is given"):
        read_rows([])


@pytest.mark.shared
def test_every_benchmark_file_is_read(shared):
    for path in sorted((shared / "data/bench").glob("*.jsonl")):
        rows = read_rows([path])
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        assert [(r.id, r.prompt, r.answer) for r in rows] == [(d["id"], d["problem"], d["answer"]) for d in records]
