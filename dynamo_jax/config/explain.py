"""What is wrong with a value and how to write it: one line each, by the names and words of the file."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dynamo_jax.config.fields import TEXTS, fields, type_of
from dynamo_jax.config.syntax import Bare, ConfigError, parse


def other_bases(tree: Any, key: str = "") -> Iterator[str]:
    """A line for each number of `tree` that YAML reads in base 8 or 60, which nobody means who writes `0100`."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from other_bases(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, Bare) and tree.base != 10:
        numbers = {str(tree.value): None}
        if tree.base == 8:
            numbers = {str(int(tree.text.replace("_", ""))): None, **numbers}
        meant = f"Write {' or '.join(numbers)}, or for a text in quotes: {_quoted(tree.text)}."
        yield f"{key} = {tree.text}: {tree.text} reads as {tree.value} in YAML (base {tree.base}). {meant}"


def explain(error: Any, tree: dict[str, Any]) -> str:
    """The line for an error of pydantic in the value `tree`."""
    *parents, leaf = [str(part) for part in error["loc"]] or [""]
    key, value = ".".join([*parents, leaf]), error["input"]
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = list(fields(type_of(parents)))
        close = difflib.get_close_matches(leaf, known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known keys here: {', '.join(known)}."
        return f"{key}: unknown key. {hint}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{key}: is missing. Add it to the file or give it as {key}=VALUE."
    written = _at(tree, error["loc"])
    if error["type"] == "string_type":
        shown, quoted = json.dumps(value), "."
        if isinstance(written, Bare):
            shown, quoted = written.text or shown, f": {_quoted(written.text)}."
        return f"{key} = {shown}: should be a text. Write it in quotes{quoted}"
    texts = type_of([*parents, leaf]) == TEXTS
    why = error["msg"].replace("Input should", "should").replace("an object", "a section of keys")
    # pydantic speaks of JSON, the file is YAML
    why = why.replace("a valid array", f"a list, such as {'[a, b]' if texts else '[1, 8]'}")
    line = f"{key} = {json.dumps(value)}: {why.removeprefix('Value error, ').rstrip('.')}."
    return line if error["type"] == "value_error" else f"{line} {_remedy(error['type'], value, written, texts)}"


def _remedy(kind: str, value: Any, written: Any, texts: bool) -> str:
    """How to write the value of an error of this kind, where that is known."""
    if kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        return f"Write it as [{written.text if isinstance(written, Bare) else json.dumps(value)}]."
    if kind == "int_type" and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return f"Write {int(value)}."
    if kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        return _without_quotes(value, bool if kind == "bool_type" else int | float)
    if value is None:
        return "Write [] for an empty one." if texts else "Give a value."
    return "Correct it."


def _without_quotes(text: str, kind: Any) -> str:
    """The remedy for a text where a number or a truth value is needed."""
    if kind is not bool and re.fullmatch(r"[-+]?0\d+", text, re.ASCII):
        return f"Write {int(text)}."
    try:
        word = parse(text, "")
    except ConfigError:
        word = None
    good = isinstance(word, Bare) and isinstance(word.value, kind) and isinstance(word.value, bool) == (kind is bool)
    return f"Write it without quotes: {text}." if good and word.base == 10 else "Correct it."


def _at(tree: Any, keys: Sequence[str | int]) -> Any:
    """What stands in the tree at `keys`; None if nothing does, as where pydantic adds a part of its own."""
    for key in keys:
        try:
            tree = tree[key]
        except (TypeError, LookupError):
            return None
    return tree


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
