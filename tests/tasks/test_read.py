"""Row layouts of JSONL and Parquet, ids, and errors that name the file and the line."""

import json

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


def test_hash_ids_do_not_depend_on_the_order_and_equal_rows_are_numbered(tmp_path):
    records = [{"prompt": f"p{i}", "answer": str(i)} for i in range(5)] + [{"prompt": "p0", "answer": "1"}]
    forward = read_rows([write_jsonl(tmp_path / "a.jsonl", *records)])
    backward = read_rows([write_jsonl(tmp_path / "b.jsonl", *records[::-1])])
    assert {r.id: (r.prompt, r.answer) for r in forward} == {r.id: (r.prompt, r.answer) for r in backward}
    assert len({r.id for r in forward}) == 6

    twice = read_rows([write_jsonl(tmp_path / "c.jsonl", *records[:1] * 3)])
    first = forward[0].id
    assert [r.id for r in twice] == [first, f"{first}#2", f"{first}#3"]


def test_columns_of_folder_names_are_not_read(tmp_path):
    folder = tmp_path / "answer=9"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1], "prompt": ["p"]}), folder / "x.parquet")
    with pytest.raises(ValueError, match="row 1: has no answer"):
        read_rows([folder / "x.parquet"])


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
        ({"problem": "p", "answer": ["5"]}, r"answer = \['5'\] is a list. Make it a text or a number"),
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


def test_duplicated_id_names_both_lines(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", {"id": "x", "prompt": "p", "answer": "5"})
    b = write_jsonl(
        tmp_path / "b.jsonl", {"id": "y", "prompt": "p", "answer": "5"}, {"id": "x", "prompt": "q", "answer": 1}
    )
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: id 'x' is already the id of .*a\.jsonl, line 1\."):
        read_rows([a, b])
    with pytest.raises(ValueError, match="is listed twice"):
        read_rows([a, tmp_path / "." / "a.jsonl"])


def test_bad_files(tmp_path):
    def message(path):
        with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
            read_rows([path])
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no such data file" in message(tmp_path / "missing.jsonl")
    assert "is a folder" in message(tmp_path)
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
