"""Rows of data files in the layouts that RLVR data comes in, each with its place in the file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_jax.config import ColumnsConfig
from dynamo_jax.run.start import READING
from dynamo_jax.tasks import chat
from dynamo_jax.tasks.chat import Message
from dynamo_jax.tasks.columns import (
    ANSWER,
    ID,
    PROMPT,
    SOLUTIONS,
    SOURCE,
    Role,
    find,
    id_text,
    inside,
    missing,
    used_twice,
    wanted,
)
from dynamo_jax.tasks.files import data_files, file_labels, no_rows, records, set_name
from dynamo_jax.tasks.first_reading import first_rows
from dynamo_jax.tasks.references import of_solution, reference

logger = logging.getLogger("dynamo_jax")


@dataclass(frozen=True)
class Row:
    """One problem. `prompt` is a text or the messages of a chat; `answer` may be a list of alternatives
    (`grading/alternatives.py`); `where` is its file and line, for error messages."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    where: str


def read_rows(
    paths: Sequence[str | Path], *, columns: ColumnsConfig | None = None, reading: int = READING
) -> list[Row]:
    """All rows of the files, folders and globs `paths`, in order (`files.data_files`); equal ones once.

    The columns are those that `columns` names. Else, of the keys of a row, the first that has a value that is not blank
    (`columns.py` lists them; docs/data.md shows the layouts in the wild):
      prompt  `prompt`, `problem`, `question`, ...: a text, or chat messages `[{role, content}, ...]`
      answer  `answer`, `ground_truth`, `reward_model.ground_truth` (verl), ...: a text, a number, or a list of
              alternatives. Of a text with `####` (GSM8K's worked solutions) what follows the last one, without
              thousands separators; of `solution` what is in its last box.
      id      `id`, `extra_info.index` (verl), else a hash of prompt and answer. verl counts from 0 in every file, so of
              several files its ids become `folder/file/index`.
    Rows of the same prompt and answer are one problem to the policy, whatever their ids: they are read once, in the
    place of the first, and their number is logged. Of several ids the shortest counts, then the first in the alphabet,
    so that ids do not depend on the order of rows and files. Different problems of the same id are told apart by the
    file or by `data_source`, where that differs, as `folder/file/id` or `source/id`. Other ids stay as they are.
    Blank lines of a JSONL file are skipped; other keys are ignored.

    With `reading` 1 files are read as they were before all this (`first_reading.py`).

    Raises ValueError, with file, line (JSONL) or row (both from 1), key and remedy, for a file that is missing,
    unreadable, without rows or of another kind, a row without prompt or answer, and an id that different problems of
    one source have.
    """
    files = data_files(paths)
    if reading == 1:
        return [Row(*row) for row in first_rows(files)]
    if reading != READING:
        raise ValueError(f"reading = {reading}: this version reads files as 1 and {READING} do. Update it.")
    columns = columns or ColumnsConfig()
    found: dict[bytes, _Found] = {}
    total = 0
    for file, label in zip(files, file_labels(files), strict=True):
        before = total
        for where, record, there in records(file, partial(wanted, columns=columns)):
            total += 1
            digest, row = _row(where, record, there, columns, file, label)
            known = found.get(digest)
            if known is None or row.rank < known.rank:
                found[digest] = row  # in the place of the first
        if total == before:
            raise no_rows(file)
    if total > len(found):
        logger.warning(
            "%s: %d of %d rows repeat the problem and the answer of another one and were left out",
            set_name(paths), total - len(found), total,
        )  # fmt: skip
    return _with_ids(list(found.values()), files)


@dataclass(frozen=True, slots=True)
class _Found:
    """A row before its id is known: `name` is what would be its id if no other problem had it, too."""

    name: str
    given: str  # the same without `label`
    hashed: bool  # the file gives no id
    prompt: str | tuple[Message, ...]
    answer: str
    where: str
    file: Path
    label: str
    source: str  # its data_source and "/", or nothing

    @property
    def rank(self) -> tuple[bool, int, str, str, str]:
        """Of equal rows the one of lowest rank counts."""
        return self.hashed, len(self.name), self.name, self.source, self.label


def _row(
    where: str, record: dict[str, Any], there: Sequence[str], columns: ColumnsConfig, file: Path, label: str
) -> tuple[bytes, _Found]:
    key, value = _column(PROMPT, record, columns.prompt, where, there)
    prompt = chat.prompt(value, where, key)
    key, value = _column(ANSWER, record, columns.answer, where, there)
    named = columns.answer is not None
    if named or key.lower() in SOLUTIONS:
        value = of_solution(value, where, key, named=named)
    answer = reference(value, where, key)
    digest = hashlib.sha256(json.dumps([prompt, answer]).encode())
    source = inside(record, SOURCE)
    source = f"{source}/" if isinstance(source, str) and source else ""
    found = find(ID, record, columns.id, where, there)
    if found is None:
        name = given = digest.hexdigest()[:16]
    else:
        name, given = id_text(*found, where, label), id_text(*found, where, "")
    return digest.digest(), _Found(name, given, found is None, prompt, answer, where, file, label, source)


def _column(role: Role, record: dict[str, Any], named: str | None, where: str, there: Sequence[str]) -> tuple[str, Any]:
    found = find(role, record, named, where, there)
    if found is None:
        raise missing(role, where, there)
    return found


def _with_ids(rows: list[_Found], files: Sequence[Path]) -> list[Row]:
    """The rows, in their order, with ids that tell all of them apart."""
    names = [row.name for row in rows]
    same: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        same.setdefault(name, []).append(place)
    for places in same.values():
        if len(places) > 1:
            apart = _told_apart([rows[place] for place in places], files)
            for place, name in zip(places, apart, strict=True):
                names[place] = name
    first: dict[str, str] = {}
    for row, name in zip(rows, names, strict=True):
        if name in first:
            raise used_twice(name, row.where, first[name])
        first[name] = row.where
    return [Row(name, row.prompt, row.answer, row.where) for row, name in zip(rows, names, strict=True)]


def _told_apart(group: Sequence[_Found], files: Sequence[Path]) -> list[str]:
    """Different ids for different problems of one id: by the file, by the source, or by both."""
    folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
    ways: tuple[Callable[[_Found], str], ...] = (
        lambda row: f"{row.label}{row.given}",
        lambda row: f"{row.source}{row.given}",
        lambda row: f"{row.file.absolute().relative_to(folder)}/{row.source}{row.given}",
    )
    for way in ways:
        names = [way(row) for row in group]
        if len(set(names)) == len(names):
            return names
    twice = Counter(names).most_common(1)[0][0]
    other, row = [row for row, name in zip(group, names, strict=True) if name == twice][:2]
    raise used_twice(row.given, row.where, other.where)
