"""Which column of a row is its prompt, its answer, its id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynamo_jax.config import ColumnsConfig

SOLUTIONS = ("solution",)  # worked; the answer is in their last box


@dataclass(frozen=True)
class Role:
    """What is looked for: `keys` as they are written (dotted ones reach into structs), then all of them in any letter
    case, and with spaces for underscores."""

    name: str  # in task.columns
    keys: tuple[str, ...]
    more: tuple[str, ...] = ()


PROMPT = Role("prompt", ("prompt", "problem", "question"), ("query", "problem_statement"))
ANSWER = Role(
    "answer",
    ("answer", "ground_truth", "reward_model.ground_truth"),
    ("final_answer", "expected_answer", "gt_answer", "gold_answer", "reference_answer", "correct_answer",
     "reward_spec.ground_truth", *SOLUTIONS),
)  # fmt: skip
ID = Role("id", ("id", "extra_info.index"))
SOURCE = "data_source"
_TOP = {key.partition(".")[0] for role in (PROMPT, ANSWER, ID) for key in (*role.keys, *role.more)} | {SOURCE}


def wanted(column: str, columns: ColumnsConfig) -> bool:
    """Whether a column of a table may be looked at."""
    named = [name for name in (columns.prompt, columns.answer, columns.id) if name]
    return _plain(column) in _TOP or column in named or column in {name.partition(".")[0] for name in named}


def find(
    role: Role, record: dict[str, Any], named: str | None, where: str, there: Sequence[str]
) -> tuple[str, Any] | None:
    """The column of `role` and its value: the named one, or the first whose value is not blank, or a blank one.

    `there` are the columns of the file. None if there is no such column and none is named.

    Raises ValueError if the named column has no value.
    """
    if named is not None:
        value = record.get(named)
        value = inside(record, named) if value is None else value
        if value is None:
            raise ValueError(
                f"{where}: the column {named!r}, which task.columns.{role.name} names, is not there or null (columns: "
                f"{', '.join(there) or 'none'}). Name another one, or fill it in."
            )
        return named, value
    blank = None
    for key in role.keys:
        value = inside(record, key)
        if value is not None:
            if not _is_blank(value):
                return key, value
            blank = blank or (key, value)
    written = {_plain(name): name for name in reversed(record)}
    for key in (*role.keys, *role.more):
        top, *below = key.split(".")
        name = ".".join([written.get(top, top), *below])
        value = inside(record, name)
        if value is not None:
            if not _is_blank(value):
                return name, value
            blank = blank or (name, value)
    return blank


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_")


def inside(record: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, None if it is not there."""
    if "." not in key:
        return record.get(key)
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def missing(role: Role, where: str, there: Sequence[str]) -> ValueError:
    """The error for a row that has no column of `role`."""
    more = f" (nor {', '.join(role.more)})" if role.more else ""
    return ValueError(
        f"{where}: has no {role.name}: none of the keys {', '.join(role.keys)}{more} has a value (keys of the row: "
        f"{', '.join(there) or 'none'}). Name its column in task.columns.{role.name}, or take the row out."
    )


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and (not value or value.isspace())


def id_text(key: str, value: Any, where: str, label: str) -> str:
    """The id that a column has, behind its file's `label` if it is verl's index. ValueError for no text and no int."""
    if not isinstance(value, int) or isinstance(value, bool):
        value = text_of(value, where, key, "a text or a whole number")
    return f"{label}{value}" if key == "extra_info.index" else str(value)


def used_twice(name: str, where: str, other: str) -> ValueError:
    """The error for an id of different problems."""
    return ValueError(
        f"{where}: id {name!r} is already the id of {other}. A prompt's success statistics are kept under its id: give "
        "every row its own."
    )


def text_of(value: Any, where: str, key: str, kinds: str, *, may_be_empty: bool = False) -> str:
    """`value` if it is a text that can be tokenized, not blank unless it `may_be_empty`; else ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} = {brief(value)} is a {type(value).__name__}. Make it {kinds}.")
    if _is_blank(value) and not may_be_empty:
        raise ValueError(f"{where}: {key} is empty. Fill it in, or take the row out.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key} holds half of a surrogate pair (\\ud800 to \\udfff). Repair it.") from None
    return value


def brief(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
