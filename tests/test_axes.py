"""The axis letters: declared once each, and no array is named with another."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_jax import batch

PACKAGE = Path(batch.__file__).parent
# The stem in small letters, so that no constant is an array; a digit is a size.
ARRAY = re.compile(r"_*[a-z][a-z0-9_]*_(?=\d?[A-Z])([A-Z0-9]{1,5})")


def table() -> dict[str, str]:
    """Letter -> meaning, from the docstring of `batch.py`."""
    entries = re.findall(r"(?<=  )([A-Z])  (\S+(?: \S+)*)", batch.__doc__ or "")
    letters = [letter for letter, _ in entries]
    assert sorted(letters) == sorted(set(letters)), "a letter is declared twice"
    assert len({meaning for _, meaning in entries}) == len(entries), "two letters mean the same"
    return dict(entries)


def arrays(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, name and suffix of each array that is named in code: variables, arguments, fields, keywords, attributes."""
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "arg", "attr", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and (match := ARRAY.fullmatch(name)):
                yield getattr(node, "lineno", 0), name, match[1]


def undeclared(source: str) -> list[str]:
    letters = table()
    return [
        f"{line}: {name}"
        for line, name, suffix in arrays(source)
        if not set(re.sub(r"\d", "", suffix)) <= letters.keys()
    ]


def test_the_table_is_read_whole() -> None:
    letters = table()
    assert len(letters) == 23
    assert letters["B"] == "rollouts in a step"
    assert letters["A"] == "query heads"
    assert letters["K"] == "key/value heads"
    assert letters["H"] == "head size"
    assert letters["S"] == "slots of a row, of a sequence"


def test_every_array_of_the_package_is_named_with_declared_letters() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    wrong = [f"{path.relative_to(PACKAGE)}:{found}" for path in files for found in undeclared(path.read_text())]
    assert not wrong
    assert sum(1 for path in files for _ in arrays(path.read_text())) > 300


@pytest.mark.parametrize(
    "line",
    ["x_BY = 1", "def f(q_BJ): ...", "f(mask_1YS=2)", "a.logp_Y", "class A:\n    k_ZBSYH: int", "_kept_Y = 1",
     "for row_Y in y: ...", "lambda z_BJ: 1", "(z_O := 3)"],
)  # fmt: skip
def test_another_letter_is_seen(line: str) -> None:
    assert len(undeclared(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["MAX_Y = 1", "_MAX_FILE_Y = 2", "a.RULES_Y", "x_BQAH = reward_2R = x_B1D", "of_process_0 = 1", "Y = 1",
     "z_tv = rows_b", "'''x_Y'''", "# x_Y", "Some_Y = 1"],
)  # fmt: skip
def test_constants_sizes_and_prose_are_not_arrays(line: str) -> None:
    assert undeclared(line) == []
