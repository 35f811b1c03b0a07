"""Data files: which ones a setting names, what a set of them is called, and the rows in each kind of them."""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

KINDS = (".jsonl", ".json", ".parquet")
PACKED = (".gz", ".zst")  # of JSONL and JSON; Parquet is compressed by itself
KNOWN = ".jsonl, .json (both also .gz and .zst) or .parquet"
NO_ROWS = frozenset(("dataset_info.json", "dataset_infos.json", "state.json"))  # what `datasets` writes beside data
BATCH = 4096  # rows of Parquet that are Python objects at a time

# Its place, the row, and the columns of its file, which may have more than were read.
Record = tuple[str, dict[str, Any], Sequence[str]]


def data_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that `paths` name, in their order; those of a folder or a glob sorted by path.

    A folder is all data files in it and in the folders below, but for hidden ones and for what `datasets` writes about
    them; `**` in a glob is any number of folders. A path that exists is itself, whatever characters it has.

    Raises ValueError, with the remedy, for no path, a path that names nothing or no data file, and a file named twice.
    """
    if not paths:
        raise ValueError("no data file is given. Name at least one .jsonl or .parquet file in task.train.")
    named: dict[Path, Path] = {}  # the real file -> as it was found
    for path in map(Path, paths):
        found = {file.resolve(): file for file in reversed(_expanded(path))}
        for real, file in reversed(found.items()):
            if real in named:
                raise ValueError(f"{file}: is listed twice. Name each data file once.")
            named[real] = file
    return list(named.values())


def _expanded(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _is_data(file) and not _hidden(file.relative_to(path))]
        if not files:
            raise ValueError(f"{path}: is a folder without data files. Name one that holds {KNOWN} files, or a file.")
        return files
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    matches = sorted(file for file in map(Path, glob.glob(str(path), recursive=True)) if file.is_file())
    if not matches:
        raise ValueError(f"{path}: no file is called so. Correct the pattern (task.train, task.eval or --benchmark).")
    return list(filter(_is_data, matches)) or matches[:1]  # whose kind is then refused


def _is_data(path: Path) -> bool:
    return bool(_kind(path)[0]) and path.name not in NO_ROWS and path.is_file()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _kind(path: Path) -> tuple[str, str]:
    """Its kind and how it is packed, both as endings; "" for a kind that cannot be read and for none."""
    name = path.name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    kind = next((ending for ending in KINDS if name.removesuffix(packed).endswith(ending)), "")
    return ("", packed) if packed and kind == ".parquet" else (kind, packed)


def stem(path: Path) -> str:
    """The name of a data file without the endings that tell its kind."""
    kind, packed = _kind(path)
    return path.name[: -len(kind + packed)] if kind else path.stem


def file_labels(files: Sequence[Path]) -> list[str]:
    """`folder/file/` for each, which verl's ids, counted from 0 in each file, begin with; "" for a file on its own."""
    return [f"{file.resolve().parent.name}/{stem(file)}/" if len(files) > 1 else "" for file in files]


def no_rows(file: Path) -> ValueError:
    """The error for a file without rows."""
    return ValueError(f"{file}: has no rows. Write one JSON object a line, or take the file out of the list.")


def set_name(paths: Sequence[str | Path]) -> str:
    """What the set of `paths` is called: stems of files, names of folders, of a glob what is no wildcard; with "+"."""
    return "+".join(_path_name(Path(path)) for path in paths)


def _path_name(path: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    if path.exists() or not glob.has_magic(str(path)):
        return stem(path)
    for part in (stem(path), *reversed(path.parent.parts)):
        if name := re.sub(r"\[[^\]]*\]|[*?]", "", part).strip("-_. /"):
            return name
    return Path.cwd().name


def records(path: Path, wanted: Callable[[str], bool], *, exact: bool = True) -> Iterator[Record]:
    """The rows of a file, each with its line (JSONL) or number, from 1. Of Parquet only `wanted` columns are read.

    Numbers that Parquet holds as float32 or float16 are the shortest decimals that give the same; without `exact`, they
    are written out (0.1 as 0.10000000149011612).

    Raises ValueError, with the place and the remedy, for a file that is missing, damaged or of another kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such data file. Correct the path (task.train, task.eval or --benchmark).")
    kind, packed = _kind(path)
    if kind == ".parquet":
        return _parquet(path, wanted, exact)
    if not kind:
        raise ValueError(f"{path}: unknown kind of data file {path.suffix!r}. Convert it to .jsonl or .parquet.")
    return _unpacked(path, packed, _json_lines if kind == ".jsonl" else _json)


def _unpacked(path: Path, packed: str, read: Callable[[Path, Iterable[bytes]], Iterator[Record]]) -> Iterator[Record]:
    try:
        with _open(path, packed) as stream:
            yield from read(path, _without_mark(stream))
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            why = error.strerror or str(error)
            raise ValueError(f"{path}: cannot be read: {why}. Check the file and its permissions.") from None
        raise ValueError(
            f"{path}: cannot be unpacked: {' '.join(str(error).split()).rstrip('.')}. Download or pack it again."
        ) from None


def _open(path: Path, packed: str) -> io.BufferedIOBase:
    if packed == ".gz":
        return gzip.open(path)
    if packed == ".zst":
        import pyarrow  # here because it takes a third of a second

        return io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def _without_mark(stream: Iterable[bytes]) -> Iterator[bytes]:
    """Its lines, without the byte order mark that the first may begin with."""
    # Bytes, because only "\n" ends a line of JSONL: a text would also be split at a lone carriage return.
    for number, line in enumerate(stream):
        yield line if number else line.removeprefix(b"\xef\xbb\xbf")


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(where, _parsed(where, line, "Write one JSON object a line."), "Write one object a line")


def _json(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    """An array of objects, or an object that holds one as `data`, or one row, or JSON Lines under another name."""
    text = b"".join(lines)
    remedy = "Write an array of objects."
    split = text.strip().split(b"\n", 1)
    if text.lstrip()[:1] == b"{" and len(split) > 1 and _is_object(split[0]):
        yield from _json_lines(path, text.split(b"\n"))
        return
    rows = _parsed(str(path), text, remedy) if text.strip() else []
    if isinstance(rows, dict):
        rows = rows["data"] if isinstance(rows.get("data"), list) else [rows]
    if not isinstance(rows, list):
        raise ValueError(f"{path}: is a JSON {type(rows).__name__}, not an array. {remedy}")
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}, row {number}", row, remedy.rstrip("."))


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(where: str, text: bytes, remedy: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: is not UTF-8: {error}. Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of nested lists
        raise ValueError(f"{where}: is not valid JSON: {error}. {remedy}") from None


def _object(where: str, value: Any, remedy: str) -> Record:
    if not isinstance(value, dict):
        example = '{"id": "1", "problem": "2 + 3 = ?", "answer": "5"}'
        raise ValueError(f"{where}: is a JSON {type(value).__name__}, not an object. {remedy}, such as {example}.")
    return where, value, tuple(value)


def _parquet(path: Path, wanted: Callable[[str], bool], exact: bool) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # A ParquetFile and not read_table, which would read columns out of folder names such as `split=train`.
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = [name for name in schema.names if wanted(name)]
            shorten = {n: f for n in columns if exact and (f := _shortener(schema.field(n).type)) is not None}
            if not columns and file.metadata.num_rows:
                yield f"{path}, row 1", {}, schema.names
            for batch in file.iter_batches(BATCH, columns=columns) if columns else ():
                for record in batch.to_pylist():
                    number += 1
                    for name, function in shorten.items():
                        record[name] = function(record[name])
                    yield f"{path}, row {number}", record, schema.names
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as Parquet: {message} Write or download the file again.") from None


def _shortener(kind: Any) -> Callable[[Any], Any] | None:
    """What makes short decimals of the float32 and float16 numbers in a value of an Arrow type; None if it has none."""
    import numpy as np
    import pyarrow.types

    if pyarrow.types.is_float32(kind) or pyarrow.types.is_float16(kind):
        narrow = np.float32 if pyarrow.types.is_float32(kind) else np.float16
        return lambda value: None if value is None else Decimal(str(narrow(value)))
    if pyarrow.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        inner = {field.name: f for field in fields if (f := _shortener(field.type)) is not None}
        return (
            (lambda value: value and {k: inner[k](v) if k in inner else v for k, v in value.items()}) if inner else None
        )
    if pyarrow.types.is_dictionary(kind):
        return _shortener(kind.value_type)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        of_item = _shortener(kind.value_type)
        return (lambda value: None if value is None else [of_item(item) for item in value]) if of_item else None
    return None
