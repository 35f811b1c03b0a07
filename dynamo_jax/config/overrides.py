"""`key.sub=value` on the command line: texts as they are written, everything else in YAML."""

from __future__ import annotations

import re
from typing import Any

from dynamo_jax.config.fields import TEXTS, type_of
from dynamo_jax.config.home import at_home
from dynamo_jax.config.syntax import Bare, ConfigError, is_null, parse

_IN_QUOTES = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
# The others of YAML's escapes are characters that nobody types, and the beginnings of \boxed, \frac, \alpha, \Phi, ...
_ESCAPE = re.compile(r'\\(["\\nt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4})')
_ESCAPED = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Put the value into `tree`, whose sections may be missing. Raises `ConfigError` naming the override."""
    key, equals, text = override.partition("=")
    keys, where = key.split("."), f"override {override!r}"
    if not equals or not key or not all(keys):
        raise ConfigError(f"{where}: is not of the form key.sub=value, for example trainer.steps=10")
    node = tree
    for depth, parent in enumerate(keys[:-1], 1):
        if is_null(node.get(parent)):
            node[parent] = {}
        if not isinstance(node[parent], dict):
            raise ConfigError(f"{where}: {'.'.join(keys[:depth])} is a value, not a section")
        node = node[parent]
    if key == "base":
        node[key] = _base(text, where)
    else:
        node[keys[-1]] = _value(type_of(keys), text, where)


def _base(text: str, where: str) -> str | Bare:
    name = _text(text)
    try:
        return name if isinstance(name, Bare) else at_home(name)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}.") from None


def _value(kind: Any, text: str, where: str) -> Any:
    if kind is str:
        return _text(text)
    if kind == TEXTS and not text.strip().startswith("["):
        word = _text(text)
        return [word] if isinstance(word, str) and word else Bare(None, text)  # an empty list is `[]`
    return parse(text, where)


def _text(text: str) -> str | Bare:
    r"""The text as it is written, but for `null`; `\n` is a line break, and `\\n` is `\n`.

    One pair of quotes around the whole of it is left out. As in YAML, nothing is special in single quotes but `''`, and
    in double quotes are `\n`, `\t`, `\"`, `\\` and characters by their numbers. Other backslashes stay.
    """
    if text == "null":
        return Bare(None, text)
    if not _IN_QUOTES.fullmatch(text):
        return re.sub(r"\\(\\?)n", lambda match: r"\n" if match[1] else "\n", text)
    inner = text[1:-1]
    return inner.replace("''", "'") if text[0] == "'" else _ESCAPE.sub(_escaped, inner)


def _escaped(match: re.Match[str]) -> str:
    return _ESCAPED.get(match[1]) or chr(int(match[1][1:], 16))
