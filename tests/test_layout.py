"""The rooms of the package stand in the order of the README's tour, and no import runs back up."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dynamo_jax"
ENTRANCES = {"", "__main__"}  # the package itself, which imports nothing, and `python -m`


def rooms() -> list[str]:
    """Names of the rooms, the lowest first: the first column of the tour's table."""
    tour = (ROOT / "README.md").read_text().partition("## A tour, in reading order")[2].partition("\n## ")[0]
    return re.findall(r"^\| `(\w+)(?:/|\.py)` \|", tour, re.MULTILINE)


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package's `__init__` has the package's name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and module of each import of the package's own modules, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            for alias in node.names if (node.module or "").split(".")[0] == "dynamo_jax" else []:
                inner = f"{node.module}.{alias.name}".removeprefix("dynamo_jax").lstrip(".")
                yield node.lineno, inner if inner in known else inner.rpartition(".")[0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dynamo_jax":
                    yield node.lineno, alias.name.removeprefix("dynamo_jax").lstrip(".")


def test_the_tour_names_every_room_once() -> None:
    order = rooms()
    assert len(order) == len(set(order))
    assert set(order) == {name.split(".")[0] for name in modules()} - ENTRANCES


def test_no_import_runs_back_up() -> None:
    order, known = rooms(), modules()
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for name, path in known.items()
        if name not in ENTRANCES
        for line, other in imports(path, known)
        if order.index(other.split(".")[0]) > order.index(name.split(".")[0])
    ]
    assert not wrong


def test_no_cycle_of_imports() -> None:
    known = modules()
    after = {name: {other for _, other in imports(path, known)} - {name} for name, path in known.items()}
    while leaves := [name for name, others in after.items() if not others]:
        after = {name: others - set(leaves) for name, others in after.items() if name not in leaves}
    assert not after


def test_no_file_over_400_lines() -> None:
    assert [name for name, path in modules().items() if len(path.read_text().splitlines()) > 400] == []
