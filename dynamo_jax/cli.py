"""The command line: `dynamo-jax train | eval | export | plan | report`.

Whatever a user can mend ends with one paragraph on stderr and exit status 2; `--traceback` shows where it came from.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from dynamo_jax.config import at_home, load_config

# jax, orbax and transformers take seconds to import: each command imports what it needs once its config is known good.

DEFAULT_K = (1, 8, 32)
OVERRIDES = "values that replace the file's: a text as it is written, all else in YAML"
CHECKPOINT = "a run folder (or gs://...), or one of its checkpoints"
# Options whose value is one word, which is none of the overrides even where it looks like one.
_TAKE_ONE = (
    "--checkpoint", "--json", "--out", "--samples", "--profile-steps", "--topology", "--lengths", "--price", "--hlo",
)  # fmt: skip
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")  # a file of such a name is written ./a=b


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 if a plan does not fit, 2 for a user's error, 75 for a
    failure that may pass (the same command goes on), 128 + n after signal n."""
    words, overrides = _take_overrides(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(words)
    try:
        if overrides:
            arguments.overrides += overrides
        status: int = arguments.run(arguments)
        return status
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        sys.stderr.write(f"dynamo-jax: error: {error}\n")
        return _leave(2)
    except KeyboardInterrupt:  # before training takes signals over, or one too many for it
        sys.stderr.write("dynamo-jax: interrupted\n")
        return 128 + signal.SIGINT


def _leave(status: int) -> int:
    """The exit status of a failure; with other processes, ends at once.

    On the usual way out jax would wait for those that this process has told to end.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stderr.flush()
        os._exit(status)
    return status


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from dynamo_jax.run.stopping import Interrupted
    from dynamo_jax.run.storage import TemporaryFailure
    from dynamo_jax.trainer import train

    try:
        train(config, arguments.profile_steps)
    except TemporaryFailure as failure:
        sys.stderr.write(f"dynamo-jax: {failure}\n")
        return os.EX_TEMPFAIL
    except Interrupted as stop:
        sys.stderr.write(f"dynamo-jax: {stop}\n")
        return 128 + stop.signal
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from dynamo_jax.evaluation.command import eval_command
    from dynamo_jax.run.bucket import place

    ks = arguments.k or [k for k in DEFAULT_K if k <= arguments.samples]
    a = arguments
    words = (config, place(a.checkpoint), a.benchmark, a.samples, ks, a.json, a.out, a.regrade)
    eval_command(*words, allow_dropped=a.allow_dropped)
    return 0


def _export(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from dynamo_jax.policy.export import export_command
    from dynamo_jax.run.bucket import place
    from dynamo_jax.tasks.task import build_tokenizer

    export_command(config, place(arguments.checkpoint), arguments.out, build_tokenizer(config).size)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    from dynamo_jax.plan import plan_command

    a = arguments
    return 0 if plan_command(config, a.topology, a.lengths, a.price, a.json, a.hlo, a.search) else 1


def _report(arguments: argparse.Namespace) -> int:
    from dynamo_jax.report import write_report
    from dynamo_jax.run.bucket_folder import local_copies

    with local_copies(arguments.runs) as runs:
        write_report(runs, arguments.out)
    sys.stdout.write(f"{arguments.out}\n")
    return 0


def _take_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """`words` without the overrides among them, and these.

    argparse wants all positional words in one run, so it would refuse an override after an option or, after an option
    that takes many values (`--benchmark`), read it as one of these.
    """
    command = next((word for word in words if not word.startswith("-")), "")
    if command not in ("train", "eval", "export", "plan"):
        return list(words), []
    rest: list[str] = []
    overrides: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before in _TAKE_ONE
        (overrides if _OVERRIDE.match(word) and not is_value else rest).append(word)
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynamo-jax", description="Reinforcement learning with verifiable rewards.")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True)

    def with_config(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("config", type=_file, help="a YAML file, such as configs/arithmetic_cpu.yaml")
        command.add_argument("overrides", nargs="*", metavar="key.sub=value", help=OVERRIDES)
        command.set_defaults(run=run)
        return command

    command = with_config("train", _train, "Train; goes on by itself if the run folder has a checkpoint.")
    text = "trace the steps FIRST to LAST (or one step) into profile/ in the run's folder"
    command.add_argument("--profile-steps", type=_steps, metavar="FIRST:LAST", help=text)

    command = with_config("eval", _eval, "Pass@1 and Pass@k with 95% intervals.")
    command.add_argument("--checkpoint", type=_place, required=True, help=CHECKPOINT)
    text = "data files, folders or globs (docs/data.md); default: the config's held-out prompts"
    command.add_argument("--benchmark", type=_place, nargs="+", default=[], metavar="FILE", help=text)
    command.add_argument("--samples", type=_positive, default=32, help="samples of each problem (default 32)")
    command.add_argument("--k", type=_positive, nargs="+", help="Pass@k to report (default 1 8 32, up to --samples)")
    command.add_argument("--json", type=_file, help="write the results to this file, too")
    text = "folder of the saved samples (default: eval/CHECKPOINT in the run's folder); a second run goes on there"
    command.add_argument("--out", type=_file, help=text)
    command.add_argument("--regrade", action="store_true", help="judge the saved samples again, sample nothing")
    text = "leave problems over task.max_prompt_tokens out of the scores, instead of counting them as wrong"
    command.add_argument("--allow-dropped", action="store_true", help=text)

    command = with_config("export", _export, "Write a folder that transformers and vLLM load.")
    command.add_argument("--checkpoint", type=_place, required=True, help=CHECKPOINT)
    command.add_argument("--out", type=_file, required=True, help="the folder to make")

    text = "Compile every program for a TPU slice without having one: does it fit, and what does a step cost?"
    command = with_config("plan", _plan, text)
    command.add_argument("--topology", required=True, help="the slice, such as v5e:4x4, v5p:2x2x2 or v6e:4x4")
    text = "mean tokens of prompts and responses, or a run folder whose metrics tell (default: the recipe's limits)"
    command.add_argument("--lengths", type=_place, metavar="prompt=150,response=900", help=text)
    command.add_argument("--price", type=_dollars, help="dollars a chip-hour: what a step costs")
    command.add_argument("--json", type=_file, metavar="FILE", help="write all figures to this file, too")
    command.add_argument("--hlo", type=_file, metavar="DIR", help="write each program's compiled text to this folder")
    text = "try meshes, micro-batches and rematerialisation, and show the best three (compiles for an hour or more)"
    command.add_argument("--search", action="store_true", help=text)

    text = "Curves and tables of runs, side by side, in one HTML file."
    command = commands.add_parser("report", help=text, description=text)
    command.add_argument("runs", type=_place, nargs="+", metavar="RUN", help="a run folder, or gs://...")
    command.add_argument("--out", type=_file, required=True, metavar="FILE.html")
    command.set_defaults(run=_report)
    return parser


def _place(text: str) -> str:
    """A path, or gs://..."""
    try:
        return at_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path:
    return Path(_place(text))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _dollars(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price in dollars, such as 1.2")
    return value


def _steps(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:LAST, two steps from 1 on, nor one step")
    return first, last
