"""Which columns are read: the usual names, those that the config names, and what is said of others."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynamo_jax.config import ColumnsConfig, load_config
from dynamo_jax.tasks.read import read_rows
from dynamo_jax.tasks.task import eval_prompts


def read(tmp_path, record, **columns):
    """The row of a JSONL file, after checking that Parquet gives the same."""
    jsonl, parquet = tmp_path / "x.jsonl", tmp_path / "x.parquet"
    jsonl.write_text(json.dumps(record) + "\n")
    pq.write_table(pa.Table.from_pylist([record]), parquet)
    (row,), (same,) = (read_rows([path], columns=ColumnsConfig(**columns)) for path in (jsonl, parquet))
    assert (row.id, row.prompt, row.answer) == (same.id, same.prompt, same.answer)
    return row


@pytest.mark.parametrize(
    "key", ["prompt", "problem", "question", "Problem", "Question", "PROMPT", "query", "Problem_Statement"]
)
def test_names_of_prompts(tmp_path, key):
    assert read(tmp_path, {"index": 3, key: "2+3?", "level": 2, "answer": "5"}).prompt == "2+3?"


@pytest.mark.parametrize(
    "key",
    ["answer", "final_answer", "expected_answer", "ground_truth", "Answer", "Final_Answer", "Final Answer",
     "gt_answer", "gold_answer", "reference_answer", "correct_answer"],
)  # fmt: skip
def test_names_of_answers(tmp_path, key):
    assert read(tmp_path, {"problem": "2+3?", "generated_solution": "so \\boxed{6}", key: "5"}).answer == "5"


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": "5", "solution": "\\boxed{6}"}, "5"),
        ({"solution": "\\boxed{6}", "Answer": 5}, "5"),
        ({"answer": "", "solution": "\\boxed{6}"}, "6"),
        ({"answer": None, "Solution": "\\boxed{6}"}, "6"),
        ({"answer": " ", "final_answer": "5", "solution": "\\boxed{6}"}, "5"),
        ({"solution": "6", "reward_model": {"style": "rule", "ground_truth": "5"}}, "5"),
        ({"solution": "\\boxed{6}", "reward_spec": {"method": "rule", "ground_truth": "5"}}, "5"),
        ({"ground_truth": "5", "final_answer": "6"}, "5"),
        ({"Answer": "6", "ground_truth": "5"}, "5"),  # as it always was
        ({"final_answer": ["5"], "solution": ["worked"]}, "5"),
    ],
)
def test_which_answer_counts(tmp_path, record, answer):
    assert read(tmp_path, {"problem": "p", **record}).answer == answer


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"id": "a", "ID": "b"}, "a"),
        ({"ID": "2024-I-1"}, "2024-I-1"),
        ({"Id": 7}, "7"),
        ({"extra_info": {"index": "9a9b6eb4", "split": "train"}, "ID": "b"}, "9a9b6eb4"),
        (
            {"uuid": "b", "unique_id": "c", "problem_id": 3, "index": 4},
            "dd45fcab14ea6a1e",
        ),  # a hash, as ever
    ],
)
def test_ids(tmp_path, record, name):
    assert read(tmp_path, {"problem": "p", "answer": "5", **record}).id == name


RECORD = {
    "text": "2+3?", "problem": "another", "meta": {"key": 9, "gold": {"value": ["5", "five"]}}, "answer": "6",
    "solution": "5", "proof": "so \\boxed{8}", "a.b": "7", "id": "unused",
    "extra_info": {"answer": "$3^2$ is \\boxed{9}"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "text", "answer": "meta.gold.value", "id": "meta.key"}, ("9", "2+3?", '["5", "five"]')),
        ({"answer": "a.b"}, ("unused", "another", "7")),  # a column of that very name
        ({"answer": "solution"}, ("unused", "another", "5")),
        ({"answer": "proof"}, ("unused", "another", "8")),
        ({"answer": "answer"}, ("unused", "another", "6")),
        ({"answer": "extra_info.answer"}, ("unused", "another", "9")),
        ({"id": "text", "prompt": "problem"}, ("2+3?", "another", "6")),
    ],
)
def test_named_columns(tmp_path, columns, expected):
    row = read(tmp_path, RECORD, **columns)
    assert (row.id, row.prompt, row.answer) == expected


@pytest.mark.parametrize("role", ["prompt", "answer", "id"])
@pytest.mark.parametrize("name", ["nowhere", "meta.nowhere", "text.x", "Text", "empty"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_named_column_that_is_not_there_is_an_error_that_names_it(tmp_path, role, name, kind):
    record, path = RECORD | {"empty": None}, tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([record]), path)
    place = "line" if kind == "jsonl" else "row"
    message = rf"x\.{kind}, {place} 1: the column '{name}', which task\.columns\.{role} names, is not there or null"
    with pytest.raises(ValueError, match=message) as error:
        read_rows([path], columns=ColumnsConfig(**{role: name}))
    assert "columns: text, problem, meta, answer, solution, proof, a.b, id, extra_info, empty" in str(error.value)


def test_a_file_without_the_usual_names_is_told_how_to_name_them(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"x": ["2+3?"], "y": ["5"]}), path)
    for role, columns in (("prompt", {}), ("answer", {"prompt": "x"})):
        told = rf"row 1: has no {role}: .*: x, y\)\. Name its column in task\.columns\.{role}"
        with pytest.raises(ValueError, match=told):
            read_rows([path], columns=ColumnsConfig(**columns))
    assert read_rows([path], columns=ColumnsConfig(prompt="x", answer="y"))[0].answer == "5"


def test_the_config_names_columns(tmp_path):
    from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer

    config, data = tmp_path / "c.yaml", tmp_path / "mine.jsonl"
    config.write_text("run_dir: r\npolicy: {architecture: {}}\ntask: {max_prompt_tokens: 16}\n")
    data.write_text('{"a": {"b": "3+4="}, "problem": "9+9=", "c": 7}\n')
    loaded = load_config(config, ["task.columns.prompt=a.b", "task.columns={prompt: a.b, answer: c}"])
    (prompts,) = eval_prompts(loaded, ArithmeticTokenizer(), [str(data)])
    assert [(p.text, p.answer) for p in prompts.prompts] == [("3+4=", "7")]
    with pytest.raises(ValueError, match=r"task\.columns\.promt: unknown key. Did you mean 'prompt'"):
        load_config(config, ["task.columns.promt=a"])
