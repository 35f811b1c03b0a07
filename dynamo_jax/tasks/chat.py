"""Prompts, as data files have them: texts and chats."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from dynamo_jax.tasks.columns import brief, text_of

Message = dict[str, str]  # {"role": ..., "content": ...}
KINDS = "a text or a list of chat messages {role, content}"
MAX_CHARS = 1_000_000  # of a chat as Python writes it; a prompt is never as long
_CHAT = re.compile(r"\s*+\[\s*+\{\s*+[\"']")
_SURELY = re.compile(r"\s*+\[\s*+\{\s*+([\"'])(?:role|content)\1\s*+:")


def prompt(value: Any, where: str, key: str) -> str | tuple[Message, ...]:
    """The prompt that a value of the column `key` is. The text of a list of messages, as JSON or Python write it, is
    those messages; a text that only begins like one is a text, unless it begins with the role or content of a message.

    Raises ValueError, with `where`, the key and the remedy, for what is neither a text nor messages with a user's.
    """
    if isinstance(value, str) and _CHAT.match(value):
        messages = _written(value)
        if messages is None and _SURELY.match(value):
            raise ValueError(
                f"{where}: {key} = {brief(value)} begins like chat messages and cannot be read as such. Write them as "
                'JSON, such as [{"role": "user", "content": "2 + 3 = ?"}].'
            )
        value = value if messages is None else messages
    return plain(value, where, key)


def plain(value: Any, where: str, key: str) -> str | tuple[Message, ...]:
    """A text, or the messages of a list; the content of the system's may be empty."""
    if not isinstance(value, list):
        return text_of(value, where, key, KINDS)
    if not value:
        raise ValueError(f"{where}: {key} is an empty list. Make it {KINDS}, or take the row out.")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: {key}[{number}] = {brief(message)} is not a message. Make {key} {KINDS}.")
        role = text_of(message.get("role"), where, f"{key}[{number}].role", "a text such as 'user'")
        content = text_of(
            message.get("content"), where, f"{key}[{number}].content", "a text", may_be_empty=role == "system"
        )
        messages.append({"role": role, "content": content})
    if all(message["role"] != "user" for message in messages):
        raise ValueError(f"{where}: {key} has no message with the role 'user'. Put the problem into one.")
    return tuple(messages)


def _written(text: str) -> list[Any] | None:
    """The messages that a text spells, None if it spells none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python(text)
    is_chat = isinstance(value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    return value if is_chat else None


def _python(text: str) -> Any:
    """What a literal of Python says, None if it is none. Nothing is called or looked up."""
    if len(text) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a backslash that repr would have doubled
            return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
