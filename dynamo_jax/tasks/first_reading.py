"""How data files were read at first, for runs that were started then: the same rows with the same ids in their order.

Every row counts, equal ones too; a text is a text, whatever list it spells; numbers of 32 bits are written out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamo_jax.config import ColumnsConfig
from dynamo_jax.tasks import chat, references
from dynamo_jax.tasks.chat import Message
from dynamo_jax.tasks.columns import ANSWER, ID, PROMPT, Role, id_text, inside, missing, used_twice, wanted
from dynamo_jax.tasks.files import file_labels, no_rows, records


def first_rows(files: Sequence[Path]) -> Iterator[tuple[str, str | tuple[Message, ...], str, str]]:
    """Id, prompt, answer and place of every row of `files`. Raises ValueError as `read.read_rows` does."""
    places: dict[str, str] = {}
    copies: Counter[str] = Counter()  # of hash ids
    for file, label in zip(files, file_labels(files), strict=True):
        count = len(places)
        for where, record, there in records(file, _read_then, exact=False):
            key, value = _first(PROMPT, record, where, there)
            prompt = chat.plain(value, where, key)
            key, value = _first(ANSWER, record, where, there)
            answer = references.plain(value, where, key)
            key, value = _first(ID, record, where, there, or_none=True)
            if value is None:
                name = hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()[:16]
                copies[name] += 1
                name += f"#{copies[name]}" if copies[name] > 1 else ""
            else:
                name = id_text(key, value, where, label)
            if name in places:
                raise used_twice(name, where, places[name])
            places[name] = where
            yield name, prompt, answer, where
        if len(places) == count:
            raise no_rows(file)


def _read_then(column: str) -> bool:
    return wanted(column, ColumnsConfig())


def _first(
    role: Role, record: dict[str, Any], where: str, there: Sequence[str], *, or_none: bool = False
) -> tuple[str, Any]:
    """The first of the role's own keys that is there and not null."""
    for key in role.keys:
        if (value := inside(record, key)) is not None:
            return key, value
    if or_none:
        return "", None
    raise missing(role, where, there)
