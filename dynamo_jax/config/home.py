"""`~` at the start of a path."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator


def at_home(path: str) -> str:
    """`path` with `~` or `~user` at its start replaced by that home folder; a file of such a name is `./~`.

    The shell does the same, but not behind the `=` of an override, nor in a file. Raises `ValueError` for a user that
    this machine does not know.
    """
    found = os.path.expanduser(path)
    if path.startswith("~") and found == path:
        raise ValueError(f"no such home folder is known here. Write ./{path} for a file of that name")
    return found


AT_HOME = AfterValidator(at_home)
PathText = Annotated[str, AT_HOME]
