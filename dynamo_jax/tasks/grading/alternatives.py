"""Reference answers that are lists of texts: of `["10000", "10,000"]` either one is right.

Pure functions, linear time; no text is evaluated as code.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

_LIST = re.compile(r"\s*\[\s*(?:[\"'\u2018\u2019\u201c\u201d]|\]\s*\Z)")
_ITEM = re.compile(
    r"""\s*+(?:(?P<text>'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")|(?P<number>[-+]?\d++(?:\.\d++)?))
    \s*+(?:(?P<last>,?+\s*+\]\s*+\Z)|,)""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {
    "\\": "\\",
    "'": "'",
    '"': '"',
    "n": "\n",
    "r": "\r",
    "t": "\t",
}  # what Python's repr writes, and the quotes
# Where a list was written without doubling its backslashes, \f of \frac, \t of \theta, \n of \nu became one character.
_EATEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f]|[\t\r](?=[a-zA-Z])"
    r"|\n(?:u|e|eq|eg|i|ot|otin|abla|mid|leq|geq|less|gtr|exists|sim|parallel|subseteq|supseteq|[ew]arrow)(?![a-zA-Z])"
)


def alternatives(gold: str) -> tuple[str, ...]:
    """What a response may equal to be right: the texts of a reference that is a list of them, else the reference.

    A list that cannot be read is taken as it stands; `tasks/references.py` refuses it when the data is loaded.
    """
    if gold[:1] != "[":  # nearly all references; grading is to lose no time
        return (gold,)
    try:
        return listed(gold) or (gold,)
    except ValueError:
        return (gold,)


def listed(text: str) -> tuple[str, ...] | None:
    """The distinct texts of a list that is written as JSON or as Python's repr, in order. None for any other text.

    Such a list begins with `[` and a quote: `[1, 2]` is an interval and `[\\frac12, 3]` is one, too. Numbers among its
    texts are written out.

    Raises ValueError, saying why, for a list that cannot be read, is empty or holds anything else.
    """
    if not is_list(text):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = _python_list(text)
    if _eaten(items):
        items = _python_list(text)  # which leaves \f and \\b alone
        if _eaten(items):
            raise ValueError("a backslash in it makes a control character; write each backslash twice")
    return texts_of(items)


def is_list(text: str) -> bool:
    """Whether a text begins as a list of texts does, be it readable or not."""
    return _LIST.match(text) is not None


def texts_of(items: Iterable[Any]) -> tuple[str, ...]:
    """The elements of a list of texts and numbers as distinct texts, in order, without white space around them.

    Raises ValueError, saying why, for an empty list and for an element that is empty or no text and no number.
    """
    texts = []
    for place, item in enumerate(items, 1):
        text = item.strip() if isinstance(item, str) else number_text(item)
        if text is None:
            what = (
                "null"
                if item is None
                else str(item)
                if isinstance(item, (float, Decimal))
                else f"a {type(item).__name__}"
            )
            raise ValueError(f"its element {place} is {what}, not a text or a number")
        if not text:
            raise ValueError(f"its element {place} is empty")
        texts.append(text)
    if not texts:
        raise ValueError("it is empty")
    return tuple(dict.fromkeys(texts))


def number_text(value: Any) -> str | None:
    """A number as people write it: 18, 0.5, 0.0000001. None for anything that is no finite number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, (float, Decimal)) or not math.isfinite(value):
        return None
    # Tables turn whole numbers into floats as soon as one row has none, and 1e-07 is no answer as people write it.
    if value == int(value):
        return str(int(value))
    return format(Decimal(repr(value)) if isinstance(value, float) else value.normalize(), "f")


def _eaten(items: Iterable[Any]) -> bool:
    return any(isinstance(item, str) and _EATEN.search(item) for item in items)


def _python_list(text: str) -> list[str]:
    """A list of texts and numbers as Python's repr writes it, without prefixes and joined literals."""
    items, item, place = [], None, text.index("[") + 1
    while item is None or item["last"] is None:
        item = _ITEM.match(text, place)
        if item is None:
            raise ValueError("it is neither JSON nor a list of texts as Python writes it")
        items.append(item["number"] or _ESCAPE.sub(_unescaped, item["text"][1:-1]))
        place = item.end()
    return items


def _unescaped(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    return chr(int(code, 16)) if code else _ESCAPED.get(escape[4], escape[0])
