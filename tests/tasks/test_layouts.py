"""The data sets of docs/data.md: a few rows of our own in the layout of each, read and graded."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dynamo_jax.config import ColumnsConfig
from dynamo_jax.tasks.grading.verifier import grade
from dynamo_jax.tasks.gsm8k import gsm8k
from dynamo_jax.tasks.read import read_rows


def verl(problem, truth, index, source="math_dapo", **extra):
    return {
        "data_source": source,
        "prompt": [{"content": problem, "role": "user"}],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, **extra},
    }


def user(problem):
    return ({"role": "user", "content": problem},)


# name: the rows, how they are stored, and (id, prompt, answer, a right response, a wrong one) of each
LAYOUTS = {
    "GSM8K": (
        [{"question": "Two dozen eggs and 1,000 more?", "answer": "A dozen is 12, so <<2*12=24>>24.\n#### 1,024"},
         {"question": "How much is left?", "answer": "10 - 12 = -2\n#### -2"}],
        "jsonl",
        [(None, "Two dozen eggs and 1,000 more?", "1024", "#### 1,024", "#### 24"),
         (None, "How much is left?", "-2", "\\boxed{-2}", "\\boxed{2}")],
    ),
    "MATH": (
        [{"problem": "Halve $1$.", "level": "Level 1", "type": "Algebra",
          "solution": "Twice $\\boxed{7}$ is no answer. We get $\\boxed{\\frac{1}{2}}.$"},
         {"problem": "The roots of $x^2-1$?", "level": "Level 2", "type": "Algebra",
          "solution": "They are $\\boxed{1}$ and $\\boxed{-1}$."}],
        "one.json",
        [(None, "Halve $1$.", "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{7}"),
         (None, "The roots of $x^2-1$?", "1, -1", "\\boxed{-1, 1}", "\\boxed{1}")],
    ),
    "MATH-500": (
        [{"problem": "Convert $(0,3)$.", "solution": "It is $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
          "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "subject": "Precalculus", "level": 2,
          "unique_id": "test/precalculus/807.json"}],
        "jsonl",
        [(None, "Convert $(0,3)$.", "\\left( 3, \\frac{\\pi}{2} \\right)",
          "\\boxed{(3, \\pi/2)}", "\\boxed{(\\pi/2, 3)}")],
    ),
    "NuminaMath-CoT": (
        [{"source": "olympiads", "problem": "What is $2^{10}$?", "solution": "Doubling gives $\\boxed{1024}$.",
          "messages": [{"role": "user", "content": "What is $2^{10}$?"},
                       {"role": "assistant", "content": "Doubling gives $\\boxed{1024}$."}]}],
        "parquet",
        [(None, "What is $2^{10}$?", "1024", "\\boxed{2^{10}}", "\\boxed{512}")],
    ),
    "NuminaMath-1.5": (
        [{"problem": "What is $2^{10}$?", "solution": "Doubling ten times, 1024.", "answer": "1024",
          "problem_type": "Algebra", "question_type": "math-word-problem", "problem_is_valid": "Yes",
          "solution_is_valid": "Yes", "source": "olympiads", "synthetic": False},
         {"problem": "And $2^{3}$?", "solution": "It is $\\boxed{8}$.", "answer": "", "problem_type": "Algebra",
          "question_type": "math-word-problem", "problem_is_valid": "Yes", "solution_is_valid": "Yes",
          "source": "olympiads", "synthetic": False}],
        "parquet",
        [(None, "What is $2^{10}$?", "1024", "\\boxed{1024}", "\\boxed{10}"),
         (None, "And $2^{3}$?", "8", "\\boxed{8}", "\\boxed{6}")],
    ),
    "DAPO-Math-17k": (
        [verl("Solve it. What is 17+17?", "34", "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"),
         verl("Solve it. What is 1-3?", "-2", "b426d104-244d-4831-a2c4-cd756b61700a")] * 3,
        "parquet",
        [("9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", user("Solve it. What is 17+17?"), "34", "Answer: 34", "Answer: 3"),
         ("b426d104-244d-4831-a2c4-cd756b61700a", user("Solve it. What is 1-3?"), "-2", "Answer: $-2$", "Answer: 2")],
    ),
    "DeepScaleR": (
        [{"problem": "Add 0.25 and 0.5.", "answer": "\\frac{3}{4}", "solution": "So $\\boxed{\\frac{3}{4}}$."},
         {"problem": "How many?", "answer": "204", "solution": ""}],
        "json",
        [(None, "Add 0.25 and 0.5.", "\\frac{3}{4}", "\\boxed{0.75}", "\\boxed{3.4}"),
         (None, "How many?", "204", "\\boxed{204}", "\\boxed{20}")],
    ),
    "OpenR1-Math": (
        [{"problem": "Solve $x+1=3$.", "solution": "Subtract 1.", "answer": "x=2", "problem_type": "Algebra",
          "question_type": "math-word-problem", "source": "olympiads", "uuid": "586fd646-76d6",
          "is_reasoning_complete": [True], "generations": ["<think>x</think> \\boxed{3}"],
          "correctness_math_verify": [True], "messages": [{"role": "user", "content": "Solve $x+1=3$."}]}],
        "parquet",
        [(None, "Solve $x+1=3$.", "x=2", "\\boxed{2}", "\\boxed{3}")],
    ),
    "Skywork-OR1": (
        [verl("A point?", '["(1,2)"]', 0, "train-math-deepscaler", model_difficulty={"R1-7B": 4}),
         verl("Ten thousand?", '["10000", "10,000"]', 0, "train-math-still3", model_difficulty={"R1-7B": 2}),
         verl("Halve one.", '["\\\\frac{1}{2}"]', 5, "train-math-still3", model_difficulty={"R1-7B": 0})],
        "parquet",
        [("train-math-deepscaler/0", user("A point?"), "(1,2)", "\\boxed{(1, 2)}", "\\boxed{[1, 2]}"),
         ("train-math-still3/0", user("Ten thousand?"), '["10000", "10,000"]', "\\boxed{10,000}", "\\boxed{1000}"),
         ("5", user("Halve one."), "\\frac{1}{2}", "\\boxed{0.5}", "\\boxed{2}")],
    ),
    "Big-Math": (
        [{"problem": "What is half of 7?", "answer": "3.5", "source": "orca_math", "domain": ["Mathematics -> Algebra"],
          "llama8b_solve_rate": 0.9}],
        "parquet",
        [(None, "What is half of 7?", "3.5", "\\boxed{\\frac{7}{2}}", "\\boxed{3}")],
    ),
    "verl": (
        [verl("6*7?", "42", 0, "openai/gsm8k", split="train", answer="6*7 = 42\n#### 42", question="6*7?"),
         verl("6*8?", "48", 1, "openai/gsm8k", split="train", answer="6*8 = 48\n#### 48", question="6*8?")],
        "parquet",
        [("0", user("6*7?"), "42", "#### 42", "#### 7"), ("1", user("6*8?"), "48", "#### 48", "#### 8")],
    ),
    "OpenMathReasoning": (
        [{"expected_answer": "\\( 12 \\)", "problem_type": "has_answer_extracted", "problem_source": "aops_c4",
          "generation_model": "DeepSeek-R1", "pass_rate_72b_tir": "0.5", "problem": "A dozen?",
          "generated_solution": f"<think>{i}</think> \\boxed{{12}}", "inference_mode": "cot"} for i in range(3)],
        "parquet",
        [(None, "A dozen?", "\\( 12 \\)", "\\boxed{12}", "\\boxed{13}")],
    ),
    "DeepMath-103K": (
        [{"question": "Is zero even?", "final_answer": "Yes", "difficulty": 4.5, "topic": "Mathematics",
          "r1_solution_1": "so \\boxed{No}", "r1_solution_2": "", "r1_solution_3": ""}],
        "parquet",
        [(None, "Is zero even?", "Yes", "\\boxed{\\text{Yes}}", "\\boxed{\\text{No}}")],
    ),
    "OlympiadBench": (
        [{"id": 1606, "question": "How many?", "solution": ["Count them."], "final_answer": ["2"], "unit": None,
          "is_multiple_answer": False, "answer_type": "Numerical"}],
        "json",
        [("1606", "How many?", "2", "\\boxed{2}", "\\boxed{3}")],
    ),
    "AIME_2024": (
        [{"ID": "2024-I-1", "Problem": "When?", "Solution": "Two hundred and four minutes.", "Answer": 204},
         {"ID": "2024-I-2", "Problem": "Where?", "Solution": "So \\boxed{025}.", "Answer": 25}],
        "jsonl",
        [("2024-I-1", "When?", "204", "\\boxed{204}", "\\boxed{24}"),
         ("2024-I-2", "Where?", "25", "\\boxed{025}", "\\boxed{5}")],
    ),
    "aime_2024": (
        [{"id": i, "problem": f"Find {i}.", "solution": "So $\\boxed{113}$.", "answer": "113", "year": "2024"}
         for i in (60, 61)],
        "parquet",
        [("60", "Find 60.", "113", "\\boxed{113}", "\\boxed{13}"),
         ("61", "Find 61.", "113", "\\boxed{113}", "\\boxed{11}")],
    ),
}  # fmt: skip


def written(folder, rows, kind):
    if kind == "one.json":  # a file a row, in folders
        for number, row in enumerate(rows):
            path = folder / "train" / f"algebra{number}" / f"{number}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(row, indent=1))
        return folder / "train"
    path = folder / f"train.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_the_wild(tmp_path, name):
    rows, kind, expected = LAYOUTS[name]
    found = read_rows([written(tmp_path, rows, kind)])
    assert [(r.prompt, r.answer) for r in found] == [each[1:3] for each in expected]
    for row, (given, _, _, right, wrong) in zip(found, expected, strict=True):
        assert row.id == given if given else len(row.id) == 16
        judge = gsm8k if right.startswith("####") else grade
        assert judge(right, row.answer)
        assert not judge(wrong, row.answer)


def test_columns_of_other_layouts_can_be_named(tmp_path):
    """Open-Reasoner-Zero's table has the turns of a conversation as its columns; TRL's DeepMath has bare solutions."""
    orz = {"0": {"from": "human", "value": "2+3?"}, "1": {"from": "assistant", "ground_truth": {"value": "5"}}}
    path = written(tmp_path, [orz], "parquet")
    (row,) = read_rows([path], columns=ColumnsConfig(prompt="0.value", answer="1.ground_truth.value"))
    assert (row.prompt, row.answer) == ("2+3?", "5")
    trl = {"prompt": [{"role": "user", "content": "2+3?"}], "solution": "5"}
    path = written(tmp_path, [trl], "jsonl")
    with pytest.raises(ValueError, match=r"solution has no \\boxed.*task\.columns\.answer=solution"):
        read_rows([path])
    (row,) = read_rows([path], columns=ColumnsConfig(answer="solution"))
    assert (row.prompt, row.answer) == (user("2+3?"), "5")
