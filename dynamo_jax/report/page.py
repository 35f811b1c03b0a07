"""The page: one HTML file that needs nothing else, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import jinja2

from dynamo_jax.report import charts, tables
from dynamo_jax.report.plots import COLORS, DASHES
from dynamo_jax.report.runs import load_runs
from dynamo_jax.report.template import STYLE, TEMPLATE
from dynamo_jax.run.storage import StorageError

# Model output may hold anything. Escaping is the template's work; these would still act on a terminal or an editor
# that the file is opened in, or turn the text around: control characters become their pictures, the rest a mark.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(
    (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML file with the curves and tables of run folders side by side.

    Reads `config.yaml`, `metrics.jsonl` and `rollouts/` of each. The same input gives the same bytes. Raises
    `ValueError` naming the file, the line and the remedy if a folder is not a run or `out` cannot be written.
    """
    loaded = load_runs(runs)
    started = [run for run in loaded if run.rows]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE).render(
        style=_style(),
        runs=loaded,
        run_color=charts.run_color,
        dashes=DASHES,
        waiting=[run.name for run in loaded if not run.rows],
        summary=tables.summary(loaded),
        scores=tables.scores(loaded),
        sections=charts.sections(loaded) if started else [],
        settings=tables.settings(loaded),
        samples=tables.samples(loaded),
        leftovers=tables.leftovers(loaded),
    )
    _write(Path(out), page.translate(_VISIBLE))


def _style() -> str:
    light, dark = (
        "".join(f"--{name}:{pair[theme]};" for name, pair in COLORS.items()) for theme in (0, 1)
    )  # fmt: skip
    return STYLE.replace("/*light*/", light).replace("/*dark*/", dark)


def _write(out: Path, page: str) -> None:
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        # "replace": half a surrogate pair, which JSON can hold, has no UTF-8 form.
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, out)
    except OSError as error:
        raise StorageError(
            f"{out}: cannot be written: {error.strerror}. Give --out a file name in a folder that exists, "
            "is writable and has space left."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
