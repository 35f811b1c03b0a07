"""`dynamo-jax plan`: does a run fit on a slice that nobody has rented yet, and what would a step of it cost?"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax

from dynamo_jax.config import Config
from dynamo_jax.plan.chips import Chip, chip_of
from dynamo_jax.plan.compiled import topology_devices
from dynamo_jax.plan.estimate import estimate, step_cost
from dynamo_jax.plan.jobs import run_jobs
from dynamo_jax.plan.lengths import Lengths, read_lengths
from dynamo_jax.plan.output import as_json, details, program_line, step_json, step_lines, title, write_text
from dynamo_jax.plan.search import best_lines, search
from dynamo_jax.run.folder import write_atomic
from dynamo_jax.sharding import make_mesh


def plan_command(
    config: Config,
    topology: str,
    lengths: str | None = None,
    price: float | None = None,
    json_file: Path | None = None,
    hlo: Path | None = None,
    searching: bool = False,
) -> bool:
    """Print what the TPU's compiler says of every device program of a run on `topology`, such as `v5e:4x4`.

    Args:
        lengths: of prompts and responses, see `read_lengths`.
        price: dollars a chip-hour.
        json_file: gets all figures, too.
        hlo: a folder for each program's compiled text.
        searching: try other meshes, micro-batches and rematerialisation, and say which are best.

    Returns whether all programs fit, or if any candidate of a search does. Raises `ValueError` where libtpu is missing,
    for a topology or a chip that is not known, for fewer devices than the mesh has, a policy whose shape is not known,
    and options that make no sense.
    """
    said = read_lengths(lengths, config)
    if searching and hlo is not None:
        raise ValueError("--search compiles many plans and keeps none: leave --hlo out, and give it with the best one.")
    _check_places(json_file, hlo)
    devices = topology_devices(topology)
    chip = chip_of(devices[0].device_kind, topology)
    if searching:
        return _search(config, topology, devices, chip, said, json_file)
    sys.stdout.write(title(config, topology, len(devices), devices[0].device_kind, chip))
    programs = []
    for job in run_jobs(config, make_mesh(config.mesh, devices)):
        one = estimate(job, config, chip, said)
        programs.append(one if hlo is None else write_text(one, hlo))
        sys.stdout.write(program_line(one, chip) + "\n")
        sys.stdout.flush()  # the next program may take minutes
    for one in programs:
        sys.stdout.writelines(details(one))
    step = step_cost(config, devices, chip, said, programs)
    if step is not None:
        sys.stdout.write(step_lines(step, programs, said, price))
    if json_file is not None:
        figures = as_json(config, topology, chip, said, programs, step, price)
        write_atomic(json_file, json.dumps(figures, indent=1) + "\n")
    return all(one.plan.verdict(chip.hbm) == "fits" for one in programs)


def _search(
    config: Config, topology: str, devices: list[jax.Device], chip: Chip, lengths: Lengths, json_file: Path | None
) -> bool:
    sys.stdout.write(f"{topology}: {len(devices)} x {devices[0].device_kind}; {lengths}.\n")
    found = search(config, devices, chip, lengths)
    sys.stdout.write(best_lines(found))
    if json_file is not None:
        best = [
            {"overrides": one.candidate.overrides.split(), "of_hbm": one.of_hbm, "step": step_json(one.step)}
            for one in found
        ]
        figures = {"topology": topology, "lengths": dataclasses.asdict(lengths), "best": best}
        write_atomic(json_file, json.dumps(figures, indent=1) + "\n")
    return bool(found)


def _check_places(json_file: Path | None, hlo: Path | None) -> None:
    """Before anything is compiled: where the results go can be written."""
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):
        raise ValueError(f"--json {json_file}: is a folder, or in none. Give a file name in a folder that exists.")
    if hlo is None:
        return
    try:
        hlo.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--hlo {hlo}: is no folder and cannot be made: {error.strerror}. Give another.") from None
