"""Problems that are trained on and held out, too: what they score may be memory."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import chain

from dynamo_jax.tasks.read import Row


def shared_problems(train: Sequence[Row], held_out: Sequence[Sequence[Row]]) -> list[list[tuple[Row, Row]]]:
    """For each of the `held_out` files its rows whose problem is in `train`, each with the first row that has it there.

    Ids, answers, system messages, the layout of the row and the kind and number of white space do not count. Time is
    linear in all rows, seconds for a million; memory, beside the rows, is that of the held-out texts.
    """
    texts = [[problem_text(row) for row in rows] for rows in held_out]
    wanted = set(chain.from_iterable(texts))
    trained: dict[str, Row] = {}
    for row in train:
        if (text := problem_text(row)) in wanted:
            trained.setdefault(text, row)
    return [
        [(row, trained[text]) for row, text in zip(rows, texts_of_file, strict=True) if text in trained]
        for rows, texts_of_file in zip(held_out, texts, strict=True)
    ]


def problem_text(row: Row) -> str:
    """The prompt, of a chat all but what the system says, in Unicode's composed form and with single spaces."""
    if isinstance(row.prompt, str):
        text = row.prompt
    else:
        text = "\n".join(message["content"] for message in row.prompt if message["role"] != "system")
    return " ".join(unicodedata.normalize("NFC", text).split())
