"""A reward function of the user's own, as a worker loads and calls it."""

from __future__ import annotations

import errno
import importlib
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Function = Callable[[str, str], Any]
MAX_TEXT = 2000  # characters of what is told of an error; a reply must fit in a pipe


class LoadError(ValueError):
    """Why a function cannot be had."""


def load(name: str, paths: Sequence[str]) -> Function:
    """The `module:function` that `import` finds on `paths`. Raises `LoadError`."""
    sys.path[:] = paths
    place, _, function = name.partition(":")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):  # it was found, and lacks another
            raise LoadError(f"cannot be loaded:\n{story(error)}\n") from error
        looked = ", ".join(paths)
        raise LoadError(f"cannot be loaded: {error}{_hidden(place)}. It was looked for in {looked}") from error
    except BaseException as error:  # whatever the module does when it is imported
        raise LoadError(f"cannot be loaded:\n{story(error)}\n") from error
    if not hasattr(module, function):
        file = getattr(module, "__file__", None) or getattr(module, "__path__", ["built in"])[0]  # a folder has no file
        raise LoadError(f"cannot be loaded: {place} ({file}) has no {function}{_hidden(place, file)}")
    found = getattr(module, function)
    if not callable(found):
        raise LoadError(f"is a {type(found).__name__}, where a function (output, gold) is needed")
    return found  # type: ignore[no-any-return]


def _hidden(place: str, found: str = "") -> str:
    """A word on a file of that module in the current folder that another module of the name has hidden."""
    file = Path.cwd().joinpath(*place.split(".")).with_suffix(".py")
    if not file.is_file() or file == Path(found):
        return ""
    return f"; {file} is hidden by another module of that name, give it a name of its own"


def finite(reward: object) -> float | None:
    """The reward as a float; None for what is no finite number."""
    if isinstance(reward, str | bytes | bytearray):
        return None  # `float` would read them
    try:
        value = float(reward)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def call(function: Function, output: str, gold: str) -> dict[str, Any]:
    """The worker's reply: the reward, or what came instead of a number."""
    try:
        reward = function(output, gold)
        value = finite(reward)
        return {"gave": repr(reward)[:MAX_TEXT]} if value is None else {"reward": value}
    except BaseException as error:  # `sys.exit` is no answer either
        return {"error": name_of(error), "story": story(error)}


def name_of(error: BaseException) -> str:
    """The name of its type; `MemoryError` for whatever says that the limit of memory is reached."""
    short = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return "MemoryError" if short else type(error).__name__


def story(error: BaseException) -> str:
    """Where it was raised, without the frames of this module and of the import, and what it says."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename][1:]
    return "".join(traceback.format_list(frames) + traceback.format_exception_only(error)).strip("\n")[-MAX_TEXT:]
