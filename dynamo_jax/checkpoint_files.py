"""The files of a checkpoint, apart from orbax: whether they are whole, and where damaged ones go.

A checkpoint's `files.json` has the size and a checksum of each of its files. Orbax itself notices a flipped bit only in
some of them, and some damages make it print tracebacks from its threads: a damaged folder never reaches it.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path

FILES_NAME = "files.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a folder that orbax still writes
# Larger files are compared by size only: reading the many gigabytes of a large run twice would slow its resume.
CHECKSUM_BYTES = 256 << 20

log = logging.getLogger("dynamo_jax")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names its folder, the reason and the remedy."""


def step_folders(directory: Path) -> list[int]:
    """Steps with a committed folder, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir())


def write_files_list(folder: Path) -> None:
    """Write `files.json` of a checkpoint that is complete but for the notes that orbax keeps at its top."""
    files = [path for part in folder.iterdir() if part.is_dir() for path in part.rglob("*") if path.is_file()]
    (folder / FILES_NAME).write_text(json.dumps({str(path.relative_to(folder)): _fingerprint(path) for path in files}))


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    path = folder / FILES_NAME
    try:
        files = json.loads(path.read_text())
        for name, expected in files.items():
            if not (folder / name).is_file():
                return f"the file {name} is missing"
            found = _fingerprint(folder / name)
            if found[0] != expected[0]:
                return f"the file {name} has {found[0]} bytes instead of {expected[0]}"
            if found != expected:
                return f"the content of the file {name} has changed"
    except (OSError, ValueError, AttributeError, LookupError, TypeError) as error:
        return f"the file {path.name} cannot be read ({error})"
    return score_damage(folder)


def score_damage(folder: Path) -> str | None:
    """What is wrong with the score, or None. Orbax reads that of every checkpoint, whichever one is restored."""
    path = folder / "metrics" / "metrics"
    try:
        if path.exists() and not isinstance(json.loads(path.read_text())["score"], float):
            raise TypeError("its score is not a number")
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
    for old in aside.iterdir() if aside.is_dir() else ():
        shutil.rmtree(old)
    aside.mkdir(exist_ok=True)
    for step in wrong:
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
    for folder in directory.glob(f"*{UNFINISHED}*"):
        shutil.rmtree(folder)


def resolve_checkpoint(path: str | Path) -> tuple[Path, int]:
    """(folder of checkpoints, step) for a run folder, its `checkpoints` folder (both: the newest) or one step's folder.

    Raises `CheckpointError` if there is no checkpoint at `path`.
    """
    path = Path(path)
    for directory in (path / "checkpoints", path):
        steps = step_folders(directory)
        if steps:
            return directory, max(steps)
    step_folder = path.resolve()
    if step_folder.name.isdigit() and any((path / name).exists() for name in ("state", "host", FILES_NAME)):
        return step_folder.parent, int(step_folder.name)
    what = "holds no checkpoint" if path.is_dir() else "no such folder"
    raise CheckpointError(f"{path}: {what}. Give a run folder, its checkpoints/ folder or one step's folder in that.")


def delete_remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to go on from the checkpoint before."


def _fingerprint(path: Path) -> list[int]:
    """Size in bytes and CRC-32 (0 for a large file)."""
    size = path.stat().st_size
    return [size, zlib.crc32(path.read_bytes()) if size <= CHECKSUM_BYTES else 0]
