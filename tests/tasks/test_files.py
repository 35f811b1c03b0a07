"""Data files: folders, globs, kinds, compression, names, and the numbers of Parquet columns."""

import gzip
import json
import os
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynamo_jax.tasks.files import data_files, set_name
from dynamo_jax.tasks.read import read_rows

ROWS = [{"id": str(i), "problem": f"p{i}\u2028", "answer": str(i)} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # pytest names tests by what they are given: alike in every process


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def message(*paths):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
        read_rows(paths)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- kinds


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", LINES),
        ("x.JSONL", LINES),
        ("x.jsonl.gz", gz(LINES)),
        ("x.jsonl.gz", gz(LINES[:20]) + gz(LINES[20:])),
        ("x.jsonl.zst", zstd(LINES)),
        ("x.jsonl.zst", zstd(LINES[:20]) + zstd(LINES[20:])),
        ("x.json", ARRAY),
        ("x.json", b"\xef\xbb\xbf\n " + ARRAY),
        ("x.json.gz", gz(ARRAY)),
        ("x.json.zst", zstd(ARRAY)),
        ("x.json", json.dumps({"version": 1, "data": ROWS}).encode()),
        ("x.json", b"\n" + LINES),  # JSON Lines under another name
    ],
)
def test_kinds_of_files(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    assert [(r.id, r.prompt, r.answer) for r in read_rows([path])] == [(*row.values(),) for row in ROWS]
    assert set_name([path]) == "x"


def test_a_json_file_of_one_object_is_one_row(tmp_path):
    """As MATH came at first: a file a problem."""
    path = tmp_path / "807.json"
    path.write_text(json.dumps({"problem": "p", "level": "Level 2", "solution": "so $\\boxed{5}$"}, indent=1))
    (row,) = read_rows([path])
    assert (row.prompt, row.answer, row.where) == ("p", "5", f"{path}, row 1")


def test_rows_of_an_array_are_counted_from_one(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([*ROWS, {"problem": "p"}]))
    assert message(path).startswith(f"{path}, row 4: has no answer")
    path.write_text(json.dumps([ROWS[0], 5]))
    assert "row 2: is a JSON int, not an object. Write an array of objects" in message(path)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("x.jsonl.gz", gz(LINES)[:-12], "cannot be unpacked: Compressed file ended before"),
        ("x.jsonl.gz", LINES, "cannot be unpacked: Not a gzipped file"),
        ("x.jsonl.gz", gz(LINES)[:30] + b"\0" * 9 + gz(LINES)[39:], "cannot be unpacked"),
        ("x.jsonl.zst", zstd(LINES)[:-9], "cannot be unpacked: Truncated compressed stream"),
        ("x.jsonl.zst", gz(LINES), "cannot be unpacked: ZSTD decompress failed"),
        ("x.jsonl.zst", zstd(LINES) + b"rest", "cannot be unpacked"),
        ("x.json", ARRAY[:-9], "is not valid JSON: Expecting"),
        ("x.json", b"5", "is a JSON int, not an array"),
        ("x.json", b"[]", "has no rows"),
        ("x.json", b" ", "has no rows"),
        ("x.json", b'{"data": []}', "has no rows"),
        ("x.json", b"[" * 100_000, "is not valid JSON"),
        ("x.json", b'[{"problem": "\xff"}]', "is not UTF-8"),
        ("x.json", LINES + b"{", "line 4: is not valid JSON"),
        ("x.jsonl.gz", b"", "has no rows"),
        ("x.jsonl.bz2", LINES, "unknown kind of data file '.bz2'"),
        ("x.parquet.gz", LINES, "unknown kind of data file '.gz'"),
        ("x.gz", LINES, "unknown kind of data file '.gz'"),
        ("x", LINES, "unknown kind of data file ''"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, words):
    path = tmp_path / name
    path.write_bytes(data)
    said = message(path)
    assert words in said
    assert said.startswith(str(path))
    assert said.endswith(".")


# --- folders, globs, names


@pytest.fixture
def tree(tmp_path):
    """Nine data files, hidden ones and others among them; each has a row of its own."""
    for place in (
        "b/train-00001.jsonl", "b/train-00000.jsonl.gz", "b/test.jsonl", "a/deep/er/one.json", "c.jsonl.zst",
        "README.md", "b/dataset_infos.json", ".cache/x.jsonl", "b/.hidden.jsonl", "b/data.csv",
    ):  # fmt: skip
        path = tmp_path / "set" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps({"problem": place, "answer": "5"}).encode()
        path.write_bytes(gz(data) if place.endswith("gz") else zstd(data) if place.endswith("zst") else data)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("pattern", "found", "name"),
    [
        ("", ["a/deep/er/one.json", "b/test.jsonl", "b/train-00000.jsonl.gz", "b/train-00001.jsonl", "c.jsonl.zst"],
         "set"),
        ("b", ["b/test.jsonl", "b/train-00000.jsonl.gz", "b/train-00001.jsonl"], "b"),
        ("b/", ["b/test.jsonl", "b/train-00000.jsonl.gz", "b/train-00001.jsonl"], "b"),
        ("b/train-*", ["b/train-00000.jsonl.gz", "b/train-00001.jsonl"], "train"),
        ("b/*", ["b/test.jsonl", "b/train-00000.jsonl.gz", "b/train-00001.jsonl"], "b"),
        ("*.jsonl.zst", ["c.jsonl.zst"], "set"),
        ("**/*.json", ["a/deep/er/one.json"], "set"),
        ("**/*.jsonl", ["b/test.jsonl", "b/train-00001.jsonl"], "set"),
        ("*/t??t.jsonl", ["b/test.jsonl"], "tt"),
        ("b/train-0000[01].jsonl*", ["b/train-00000.jsonl.gz", "b/train-00001.jsonl"], "train-0000"),
        ("a/**", ["a/deep/er/one.json"], "a"),
    ],
)  # fmt: skip
def test_folders_and_globs(tree, pattern, found, name):
    path = f"{tree}/{pattern}"
    assert [row.prompt for row in read_rows([path])] == found
    assert set_name([path]) == name
    assert set_name([path, "x/y.jsonl"]) == f"{name}+y"


def test_a_glob_in_the_current_folder_has_its_name(tree, monkeypatch):
    monkeypatch.chdir(tree / "b")
    assert [str(path) for path in data_files(["*.jsonl"])] == ["test.jsonl", "train-00001.jsonl"]
    assert set_name(["*.jsonl"]) == set_name(["."]) == "b"


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    path = tmp_path / "x[1].jsonl"
    path.write_bytes(LINES)
    (tmp_path / "x1.jsonl").write_text("not read")
    assert data_files([path]) == [path]
    assert set_name([path]) == "x[1]"


def test_links_to_one_file_count_once_in_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    os.symlink(tmp_path / "a.jsonl", tmp_path / "latest.jsonl")
    assert data_files([tmp_path]) == [tmp_path / "a.jsonl"]


def test_folders_and_globs_that_hold_nothing(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.csv").touch()
    assert "is a folder without data files. Name one that holds .jsonl" in message(tmp_path / "empty")
    assert "is a folder without data files" in message(tmp_path / "other")
    assert "no file is called so. Correct the pattern" in message(tree / "b/nothing-*.jsonl")
    assert "no such data file" in message(tree / "b/nothing.jsonl")
    assert "unknown kind of data file '.csv'" in message(tree / "b/*.csv")


def test_verl_files_of_a_folder_have_ids_of_their_own(tmp_path):
    for split in ("train", "test"):
        record = {"prompt": split, "reward_model": {"ground_truth": "5"}, "extra_info": {"index": 0}}
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / f"{split}.parquet")
    assert [r.id for r in read_rows([tmp_path])] == [f"{tmp_path.name}/test/0", f"{tmp_path.name}/train/0"]


# --- columns of Parquet


def answers(tmp_path, column, name="answer"):
    table = pa.table({"problem": [f"p{i}" for i in range(len(column))], name: column})
    pq.write_table(table, tmp_path / "x.parquet")
    return [row.answer for row in read_rows([tmp_path / "x.parquet"])]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float16()])
def test_narrow_numbers_are_the_shortest_decimals_that_give_the_same(tmp_path, kind):
    expected = ["0.1", "-2.5", "3", "0.333", "0.7", "0"]
    values = pa.array([float(text) for text in expected], pa.float64()).cast(pa.float32()).cast(kind)
    assert answers(tmp_path, values) == expected
    assert answers(tmp_path, pa.array([{"ground_truth": v} for v in values.to_pylist()],
                                      pa.struct([("ground_truth", kind)])), "reward_model") == expected  # fmt: skip
    lists = pa.array([[v] for v in values.to_pylist()], pa.list_(kind))
    assert answers(tmp_path, lists) == expected
    assert answers(tmp_path, lists.cast(pa.large_list(kind))) == expected
    pairs = pa.array([[v, 1.1] for v in values.to_pylist()], pa.list_(kind, 2))
    assert answers(tmp_path, pairs)[0] == '["0.1", "1.1"]'


def test_large_and_tiny_narrow_numbers(tmp_path):
    values = [1e-7, 16777216.0, 3.4e38, 123456.79, 1 / 3]
    assert answers(tmp_path, pa.array(values, pa.float32())) == [
        "0.0000001", "16777216", "34" + "0" * 37, "123456.79", "0.33333334"
    ]  # fmt: skip


def test_wide_numbers_stay_as_they_are(tmp_path):
    assert answers(tmp_path, pa.array([0.1, 0.10000000149011612, 1 / 3, 2.0])) == [
        "0.1", "0.10000000149011612", "0.3333333333333333", "2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([5, -6], pa.int8()), ["5", "-6"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([Decimal("5.00"), Decimal("-0.250")], pa.decimal128(10, 3)), ["5", "-0.25"]),
        (pa.array([Decimal(10**40)], pa.decimal256(50, 2)), ["1" + "0" * 40]),
        (pa.array(["5", "x", "5"]).dictionary_encode(), ["5", "x", "5"]),
        (pa.array(["5"], pa.large_string()), ["5"]),
        (pa.array([["10000", "10,000"]]), ['["10000", "10,000"]']),
        (pa.array(["['5']"]), ["5"]),
    ],
)
def test_types_of_columns(tmp_path, column, expected):
    assert answers(tmp_path, column) == expected


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([True]), "row 1: answer = True is a bool"),
        (pa.array([float("nan")], pa.float32()), "row 1: answer = NaN is not a number"),
        (
            pa.array([[]], pa.list_(pa.float32())),
            "row 1: answer = [] is a list of alternative answers that cannot be read",
        ),
        (pa.array([[0.5, None]], pa.list_(pa.float32())), "its element 2 is null"),
        (pa.array([b"5"]), "row 1: answer = b'5' is a bytes"),
        (pa.array([None], pa.float32()), "row 1: has no answer"),
    ],
)
def test_columns_that_are_no_answers(tmp_path, column, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        answers(tmp_path, column)
    assert words in str(error.value)
