"""Rows of JSONL and Parquet files in the layouts that RLVR data comes in, each with its place in the file."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

PROMPT_KEYS = ("prompt", "problem", "question")
ANSWER_KEYS = ("answer", "ground_truth", "reward_model.ground_truth")

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True)
class Row:
    """One problem. `prompt` is a text or the messages of a chat; `where` is its file and line, for error messages."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    where: str


def read_rows(paths: Sequence[str | Path]) -> list[Row]:
    """All rows of `paths` (.jsonl or .parquet), in order.

    Of the keys of a row the first that is there and not null counts:
      prompt  `prompt` (a text, or chat messages `[{role, content}, ...]`), `problem`, `question`
      answer  `answer`, `ground_truth`, `reward_model.ground_truth` (verl); a text or a number. Of a text with `####`
              (GSM8K's worked solutions) only what follows the last one, without thousands separators.
      id      `id`, `extra_info.index` (verl), else a hash of prompt and answer. None depends on the order of the rows.
              verl counts from 0 in every file, so of several files its ids become `folder/file/index`. Rows that are
              equal in prompt and answer and have no id are told apart as `hash`, `hash#2`, ...
    Blank lines of a JSONL file are skipped; other keys are ignored.

    Raises ValueError, with file, line (JSONL) or row (Parquet; both from 1), key and remedy, for a file that is
    missing, unreadable, without rows or of another kind, a row without prompt or answer, and an id used twice.
    """
    if not paths:
        raise ValueError("no data file is given. Name at least one .jsonl or .parquet file in task.train.")
    places: dict[str, str] = {}  # id -> where it was first seen
    copies: dict[str, int] = {}  # hash id -> rows seen with it
    rows: list[Row] = []
    files: set[Path] = set()
    for path in map(Path, paths):
        if path.resolve() in files:
            raise ValueError(f"{path}: is listed twice. Name each data file once.")
        files.add(path.resolve())
        scope = f"{path.resolve().parent.name}/{path.stem}/" if len(paths) > 1 else ""
        before = len(rows)
        for where, record in _records(path):
            prompt, answer = _prompt(record, where), _answer(record, where)
            row_id = _given_id(record, where, scope)
            if row_id is None:
                row_id = hashlib.sha256(json.dumps([prompt, answer]).encode()).hexdigest()[:16]
                copies[row_id] = copies.get(row_id, 0) + 1
                row_id += f"#{copies[row_id]}" if copies[row_id] > 1 else ""
            if row_id in places:
                raise ValueError(
                    f"{where}: id {row_id!r} is already the id of {places[row_id]}. A prompt's success statistics are "
                    "kept under its id: give every row its own."
                )
            places[row_id] = where
            rows.append(Row(row_id, prompt, answer, where))
        if len(rows) == before:
            raise ValueError(f"{path}: has no rows. Write one JSON object a line, or take the file out of the list.")
    return rows


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        raise ValueError(f"{path}: no such data file. Correct the path (task.train, task.eval or --benchmark).")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a data file. Name the .jsonl or .parquet files in it.")
    if path.suffix == ".jsonl":
        return _jsonl_records(path)
    if path.suffix == ".parquet":
        return _parquet_records(path)
    raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}. Convert it to .jsonl or .parquet.")


def _jsonl_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        # Bytes, because only "\n" ends a line of JSONL: reading text would also split at a lone carriage return.
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}. Check the file and its permissions.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: is not UTF-8: {error}. Save the file as UTF-8.") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
            raise ValueError(f"{where}: is not valid JSON: {error}. Write one JSON object a line.") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: is a JSON {type(record).__name__}, not an object. Write one object a line, such as "
                '{"id": "1", "problem": "2 + 3 = ?", "answer": "5"}.'
            )
        yield where, record


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    wanted = {key.partition(".")[0] for key in (*PROMPT_KEYS, *ANSWER_KEYS, "id", "extra_info.index")}
    try:
        # A ParquetFile and not read_table, which would read columns out of folder names such as `split=train`.
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in wanted]
            records = file.read(columns=columns).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as Parquet: {message} Write or download the file again.") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, row {number}", record


def _first(record: dict[str, Any], keys: Sequence[str]) -> tuple[str, Any] | None:
    """The first of the (dotted) keys that is there and not null, with its value."""
    for key in keys:
        value: Any = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return key, value
    return None


def _missing(where: str, what: str, keys: Sequence[str], record: dict[str, Any]) -> ValueError:
    there = ", ".join(record) or "none"
    return ValueError(
        f"{where}: has no {what}: none of the keys {', '.join(keys)} has a value (keys of the row: {there}). "
        f"Put the {what} under one of them, or take the row out."
    )


def _text(value: Any, where: str, key: str, kinds: str) -> str:
    """`value` if it is a non-blank text that can be tokenized."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} = {_brief(value)} is a {type(value).__name__}. Make it {kinds}.")
    if not value.strip():
        raise ValueError(f"{where}: {key} is empty. Fill it in, or take the row out.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{where}: {key} holds half of a surrogate pair (\\ud800 to \\udfff). Repair it.") from None
    return value


def _prompt(record: dict[str, Any], where: str) -> str | tuple[Message, ...]:
    found = _first(record, PROMPT_KEYS)
    if found is None:
        raise _missing(where, "prompt", PROMPT_KEYS, record)
    key, value = found
    kinds = "a text or a list of chat messages {role, content}"
    if not isinstance(value, list):
        return _text(value, where, key, kinds)
    if not value:
        raise ValueError(f"{where}: {key} is an empty list. Make it {kinds}, or take the row out.")
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{where}: {key}[{number}] = {_brief(message)} is not a message. Make {key} {kinds}.")
        role = _text(message.get("role"), where, f"{key}[{number}].role", "a text such as 'user'")
        content = _text(message.get("content"), where, f"{key}[{number}].content", "a text")
        messages.append({"role": role, "content": content})
    if all(message["role"] != "user" for message in messages):
        raise ValueError(f"{where}: {key} has no message with the role 'user'. Put the problem into one.")
    return tuple(messages)


def _answer(record: dict[str, Any], where: str) -> str:
    found = _first(record, ANSWER_KEYS)
    if found is None:
        raise _missing(where, "answer", ANSWER_KEYS, record)
    key, value = found
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {key} = {value} is not a number. Correct it, or take the row out.")
        # Tables turn whole numbers into floats as soon as one row has none, and 1e-07 is no answer as people write it.
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    text = _text(value, where, key, "a text or a number")
    if "####" in text:
        text = re.sub(r"(?<=\d),(?=\d{3})", "", text.rpartition("####")[2])
        if not text.strip():
            raise ValueError(f"{where}: {key} has nothing after its last ####. Put the final answer there.")
    return text.strip()


def _given_id(record: dict[str, Any], where: str, scope: str) -> str | None:
    found = _first(record, ("id", "extra_info.index"))
    if found is None:
        return None
    key, value = found
    if not isinstance(value, int) or isinstance(value, bool):
        value = _text(value, where, key, "a text or a whole number")
    return f"{scope}{value}" if key == "extra_info.index" else str(value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
