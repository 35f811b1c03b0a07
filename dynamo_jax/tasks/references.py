"""Reference answers, as data files have them: texts, numbers, worked solutions, and lists of alternatives."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from dynamo_jax.tasks.columns import brief, text_of
from dynamo_jax.tasks.grading.alternatives import is_list, listed, number_text, texts_of
from dynamo_jax.tasks.grading.extract import extract

KINDS = "a text or a number"
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])")


def reference(value: Any, where: str, key: str) -> str:
    """The reference answer that a value of the column `key` is; several alternatives as the JSON text of a list.

    A list, real or written as JSON or in Python's way, holds alternatives: one is the answer itself, several are all
    right (`grading/alternatives.py`). Of each text with `####` (GSM8K) only what follows the last one counts, without
    thousands separators.

    Raises ValueError, with `where`, the key and the remedy, for anything else.
    """
    texts: tuple[str, ...] | None
    try:
        if isinstance(value, list):
            texts = texts_of(text for item in value for text in _within(item))
        else:
            texts = listed(value) if isinstance(value, str) else None
        if any(map(is_list, texts or ())):
            raise ValueError("it holds another list")
    except ValueError as error:
        raise ValueError(
            f"{where}: {key} = {brief(value)} is a list of alternative answers that cannot be read: {error}. Make it "
            'one answer, or a list of texts and numbers such as ["10000", "10,000"].'
        ) from None
    if texts is None:
        return plain(value, where, key)
    answers = dict.fromkeys(plain(text, where, key) for text in texts)
    return next(iter(answers)) if len(answers) == 1 else json.dumps(list(answers), ensure_ascii=False)


def _within(item: Any) -> tuple[Any, ...]:
    return (listed(item) if isinstance(item, str) else None) or (item,)


def plain(value: Any, where: str, key: str) -> str:
    """A text or a number as the answer that it is, after the last `####` of a text that has some."""
    number = number_text(value)
    if number is not None:
        return number
    if isinstance(value, (float, Decimal)):
        raise ValueError(f"{where}: {key} = {value} is not a number. Correct it, or take the row out.")
    text = text_of(value, where, key, KINDS)
    if "####" in text:
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text.rpartition("####")[2])
        if not text.strip():
            raise ValueError(f"{where}: {key} has nothing after its last ####. Put the final answer there.")
    return text.strip()


def of_solution(value: Any, where: str, key: str, *, named: bool) -> Any:
    """What stands in the last box of a worked solution, or after its last `####`; for `reference` to read.

    Of a column that the user has `named` as the answer, a value without a box is taken as it stands.

    Raises ValueError if the last box is empty or not closed, and for a solution that was only found and has no box.
    """
    if named and (not isinstance(value, str) or is_list(value)):
        return value
    text = text_of(value, where, key, "a text whose last \\boxed{} holds the answer")
    if _BOX.search(text):
        answer = extract(text)
        if answer is None:
            raise ValueError(f"{where}: the last box of {key} is empty or not closed. Correct it, or take the row out.")
        return answer
    if named or "####" in text:
        return text
    raise ValueError(
        f"{where}: {key} has no \\boxed{{}}, and the row has no other answer. Put the answer into a column of its own, "
        f"take the row out, or set task.columns.answer={key} if {key} is nothing but the answer."
    )
