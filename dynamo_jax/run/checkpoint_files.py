"""The files of a checkpoint, apart from orbax: whether they are whole, and where damaged ones go.

A checkpoint's `files.json` has the size and a checksum of each of its files. Orbax itself notices a flipped bit only in
some of them, and some damages make it print tracebacks from its threads: a damaged folder never reaches it.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dynamo_jax.run.bucket import COMMITTED, below, is_remote, move, place, reaching, remove
from dynamo_jax.run.storage import StorageError

FILES_NAME = "files.json"
SCORE_NAME = "metrics/metrics"  # where orbax keeps one
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax still writes
# Larger files are compared by size only: reading the many gigabytes of a large run twice would slow its resume.
CHECKSUM_BYTES = 256 << 20

log = logging.getLogger("dynamo_jax")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names its folder, the reason and the remedy."""


def step_folders(directory: Path) -> list[int]:
    """Steps with a committed folder, ascending. Raises `StorageError` if a bucket cannot be reached."""
    with reaching(directory):
        if not directory.is_dir():
            return []
        numbered = [entry for entry in directory.iterdir() if entry.name.isdigit()]
        return sorted(int(entry.name) for entry in numbered if _is_committed(entry))


def write_files_list(folder: Path) -> None:
    """Write `files.json` of a checkpoint that is complete but for the notes that orbax keeps at its top."""
    if is_remote(folder):
        names = {name for name in below(folder) if "/" in name}
    else:
        files = [path for part in folder.iterdir() if part.is_dir() for path in part.rglob("*") if path.is_file()]
        names = {str(path.relative_to(folder)) for path in files}
    (folder / FILES_NAME).write_text(json.dumps(_fingerprints(folder, names)))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None. Raises `StorageError` if a bucket cannot be reached."""
    path = folder / FILES_NAME
    try:
        files: dict[str, list[Any]] = json.loads(_read(path))
        found = _fingerprints(folder, files)
        for name, expected in files.items():
            if name not in found:
                return f"the file {name} is missing"
            if found[name][0] != expected[0]:
                return f"the file {name} has {found[name][0]} bytes instead of {expected[0]}"
            # Checkpoints may have been copied between a disk and a bucket, which have different checksums.
            if any(a and b and a != b for a, b in zip(found[name], expected, strict=False)):
                return f"the content of the file {name} has changed"
    except StorageError:
        raise
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        return f"the file {path.name} cannot be read ({error})"
    return score_damage(folder)


def score_damage(folder: Path) -> str | None:
    """What is wrong with the score, or None. Orbax reads that of every checkpoint, whichever one is restored."""
    path = folder / SCORE_NAME
    try:
        if not isinstance(json.loads(_read(path))["score"], float):
            raise TypeError("its score is not a number")
    except FileNotFoundError:
        return None  # not every checkpoint has one
    except StorageError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"the file metrics/metrics cannot be read ({type(error).__name__}: {error})"
    return None


def set_damaged_aside(directory: Path) -> None:
    """Leave in `directory` only checkpoints that the run can go on from or keep as its best.

    The newest sound one is looked for from the newest on, file by file; of those before it only the score is read.
    """
    wrong: dict[int, str] = {}
    sound: int | None = None
    for step in reversed(step_folders(directory)):
        folder = directory / str(step)
        why = damage(folder) if sound is None else score_damage(folder)
        if why:
            wrong[step] = why
        elif sound is None:
            sound = step
    if wrong:
        set_aside(directory, wrong, sound)


def set_aside(directory: Path, wrong: Mapping[int, str], sound: int | None) -> None:
    """Move the checkpoints of the steps in `wrong` (step -> what is wrong) out of the way, and say so in one warning.

    They are not deleted, but those of earlier calls are, so that the disk does not fill with them. `sound` is the step
    that the run goes on from.
    """
    aside = aside_folder(directory)
    if is_remote(directory):
        remove(aside)
    elif aside.exists():
        shutil.rmtree(aside)
    for step in wrong:
        if is_remote(directory):
            move(directory / str(step), aside / str(step))
        else:
            aside.mkdir(exist_ok=True)
            (directory / str(step)).rename(aside / str(step))
    what = "; ".join(f"{directory / str(step)}: is damaged: {why}" for step, why in wrong.items())
    then = (
        f"The run goes on from step {sound}"
        if sound is not None
        else "NO SOUND CHECKPOINT IS LEFT: THE RUN STARTS ANEW"
    )
    log.warning("%s. Moved to %s/. %s.", what, aside, then)


def aside_folder(directory: Path) -> Path:
    """Where damaged checkpoints go: beside the others, for orbax takes every folder among them for one of its own."""
    return directory.with_name(f"{directory.name}_damaged")


def remove_unfinished(directory: Path) -> None:
    """Remove what a failed save has left: on a full disk it would stand in the way of the next one."""
    if is_remote(directory):
        with reaching(directory):
            entries = list(directory.iterdir()) if directory.is_dir() else []
        for entry in entries:
            if entry.name.isdigit() and not _is_committed(entry):
                remove(entry)
        return
    for folder in directory.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(folder)


def resolve_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(folder of checkpoints, step) for a run folder, its `checkpoints` folder (both: the newest) or one step's folder.

    Raises `CheckpointError` if there is no checkpoint at `path`.
    """
    path = place(path)
    for directory in (path / "checkpoints", path):
        steps = step_folders(directory)
        if steps:
            return directory, max(steps)
    step_folder = path if is_remote(path) else path.resolve()
    if step_folder.name.isdigit() and any((path / name).exists() for name in ("state", "host", FILES_NAME)):
        return step_folder.parent, int(step_folder.name)
    what = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {what}. Give a run folder, its checkpoints/ folder or one step's folder in that.")


def written(folder: Path) -> int:
    """A number that no other checkpoint in its place would have: a time, or what a bucket counts its writes by.

    A score, which may come later, does not change it.
    """
    if is_remote(folder):
        files = {name: info for name, info in below(folder).items() if name != SCORE_NAME}
        return max((int(info["generation"]) for info in files.values()), default=0)
    list_of_files = folder / FILES_NAME  # a folder of another make has none
    paths = [list_of_files] if list_of_files.exists() else [folder, *folder.iterdir()]
    return max(path.stat().st_mtime_ns for path in paths)


def delete_remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to go on from the checkpoint before."


def _is_committed(folder: Path) -> bool:
    """On a disk, unfinished ones have a suffix."""
    with reaching(folder):
        return (folder / COMMITTED).exists() if is_remote(folder) else folder.is_dir()


def _read(path: Path) -> str:
    """Raises `StorageError` if a bucket cannot be reached, `OSError` or `ValueError` otherwise."""
    if not is_remote(path):
        return path.read_text()
    with reaching(path):
        try:
            return path.read_text()
        except FileNotFoundError:
            pass
    raise FileNotFoundError(2, "No such object", str(path))


def _fingerprints(folder: Path, names: Collection[str]) -> dict[str, list[Any]]:
    """For each of the files that is there: its size, CRC-32 (0: unknown, of a large file) and a bucket's CRC-32C.

    A bucket tells its own checksums with the listing; nothing is read.
    """
    if is_remote(folder):
        found = below(folder)
        return {name: [found[name]["size"], 0, found[name].get("crc32c", "")] for name in names if name in found}
    return {name: _fingerprint(folder / name) for name in names if (folder / name).is_file()}


def _fingerprint(path: Path) -> list[Any]:
    """Size in bytes and CRC-32 (0 for a large file)."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= CHECKSUM_BYTES else 0]
