"""What the submit scripts share: settings without defaults, checks before anything is paid for, running commands."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INPUTS = "/mnt/disks/inputs"  # where --inputs is mounted; Batch's machines take volumes only under /mnt/disks

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_FIXED = ("run_dir", "device")  # overrides that the job itself makes


class Mistake(ValueError):
    """Something that the user must mend: one message, exit status 2, nothing started."""


def parser(description: str | None, machines: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with what every job needs. Where it may run and what it may cost has no default."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    if machines:
        made.add_argument("machine", choices=machines, help="a file next to the script: what is rented")
    made.add_argument("config", metavar="CONFIG", help="a recipe of this checkout, such as configs/arithmetic_cpu.yaml")
    made.add_argument("overrides", nargs="*", metavar="key.sub=value", help="as for dynamo-jax train")
    setting(made, "image", "the image, with a tag or digest, such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG")
    setting(made, "bucket", "the bucket of the run folder gs://BUCKET/runs/RUN")
    made.add_argument("--run", help="name of the run; the same name again goes on with it")
    made.add_argument("--inputs", metavar="BUCKET/FOLDER", help=f"mounted read-only at {INPUTS}: data and models")
    choice = made.add_mutually_exclusive_group()
    choice.add_argument("--spot", dest="spot", action="store_const", const=True, help="cheap, may be preempted")
    choice.add_argument("--on-demand", dest="spot", action="store_const", const=False, help="dear, stays")
    made.add_argument("--build", action="store_true", help="build and push the image with Cloud Build first")
    made.add_argument("--dry-run", action="store_true", help="print what would be run and sent; start nothing")
    return made


def setting(to: argparse.ArgumentParser, name: str, text: str) -> None:
    """`--name`, or else the environment's DYNAMO_JAX_NAME."""
    to.add_argument(f"--{name}", default=os.environ.get(variable(name)) or None, help=f"{text} (or {variable(name)})")


def variable(name: str) -> str:
    return "DYNAMO_JAX_" + name.upper().replace("-", "_")


def check(arguments: argparse.Namespace, needed: Iterable[str], run_length: int) -> None:
    """Raise `Mistake` for what is missing, all at once, and for what the services would refuse later."""
    missing = [
        f"--{name} (or {variable(name)})" for name in needed if getattr(arguments, name.replace("-", "_")) is None
    ]
    if arguments.run is None:
        missing.append("--run")
    if arguments.spot is None:
        missing.append("--spot or --on-demand")
    if missing:
        raise Mistake(f"missing {', '.join(missing)}. They decide where the job runs and what it costs: no defaults.")
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", arguments.run) or len(arguments.run) > run_length:
        raise Mistake(f"--run {arguments.run}: at most {run_length} of a-z, 0-9 and -, from a letter on")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", arguments.bucket):
        raise Mistake(f"--bucket {arguments.bucket}: the bare name, without gs:// and without a folder")
    if not re.fullmatch(r"\S+/[^\s/]+(:[\w.-]+|@sha256:[0-9a-f]{64})", arguments.image):
        raise Mistake(f"--image {arguments.image}: give a tag or digest, so that a retry runs the same code")
    if arguments.inputs is not None and not re.fullmatch(r"[a-z0-9._-]+/[^\s,]*[^\s,/]", arguments.inputs):
        raise Mistake(f"--inputs {arguments.inputs}: BUCKET/FOLDER, without gs://")


def check_recipe(config: str, overrides: Sequence[str], device: str, chips: int) -> None:
    """Raise `Mistake` for a recipe that the rented machines would refuse, or would use in part only."""
    parts = Path(config).parts
    if parts[:1] != ("configs",) or ".." in parts or not (ROOT / config).is_file():
        raise Mistake(f"{config}: the image holds the recipes of this checkout: name a file as configs/...")
    for word in overrides:
        if not _OVERRIDE.match(word):
            raise Mistake(f"{word!r} is not an override, key.sub=value")
        if word.split("=")[0] in _FIXED:
            raise Mistake(f"{word}: the job sets run_dir (from --bucket and --run) and device")
    sys.path.insert(0, str(ROOT))
    try:
        from dynamo_jax.config import load_config
    except ImportError:
        sys.stderr.write("dynamo_jax is not installed here: the recipe is checked only once the machine runs.\n")
        return
    with contextlib.chdir(ROOT):  # `base=configs/...` is relative to the working folder, which is the image's /app
        try:
            mesh = load_config(config, [*overrides, f"device={device}"]).mesh
        except (ValueError, OSError) as error:
            raise Mistake(str(error)) from None
    if mesh.size != chips:
        raise Mistake(
            f"mesh = data {mesh.data} x fsdp {mesh.fsdp} x tensor {mesh.tensor} uses {mesh.size} devices, the job "
            f"rents {chips}. Add overrides such as mesh.fsdp={chips}."
        )


def fill(tree: Any, values: dict[str, str]) -> Any:
    """`tree` with `${NAME}` replaced in all of its strings: after parsing, so that no value can break the syntax."""
    if isinstance(tree, dict):
        return {key: fill(value, values) for key, value in tree.items()}
    if isinstance(tree, list):
        return [fill(value, values) for value in tree]
    if isinstance(tree, str):
        return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], tree)
    return tree


def build_command(arguments: argparse.Namespace, extra: str) -> list[str]:
    """Cloud Build's command for the image, with one of the extras that bring jax for an accelerator."""
    words = ["gcloud", "builds", "submit", "--project", arguments.project]
    words += ["--config", str(ROOT / "launch" / "cloudbuild.yaml")]
    return [*words, "--substitutions", f"_IMAGE={arguments.image},_EXTRA={extra}", str(ROOT)]


def show(command: Sequence[str], document: str = "") -> None:
    """Print a command as it can be pasted, and what it reads."""
    sys.stdout.write(f"+ {shlex.join(command)}\n{document}")


def run(command: Sequence[str], document: str | None = None, capture: bool = False) -> str:
    """Run a command with `document` as its input. Raises `SystemExit` with its status if it fails."""
    try:
        done = subprocess.run(
            command,
            input=document,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL if document is None else None,
            stdout=subprocess.PIPE if capture else None,
        )
    except FileNotFoundError:
        raise Mistake(f"{command[0]} is not installed") from None
    if done.returncode:
        sys.stderr.write(f"failed: {shlex.join(command)}\n")
        raise SystemExit(done.returncode)
    return (done.stdout or "").strip()


def main(submit: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Exit status of a submit script."""
    try:
        submit(argv)
    except Mistake as mistake:
        sys.stderr.write(f"submit: error: {mistake}\n")
        return 2
    return 0
