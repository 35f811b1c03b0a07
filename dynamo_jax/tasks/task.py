"""A task: the prompts to train and to evaluate on, the tokenizer they are written with, and who judges the answers."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import jax

from dynamo_jax.config import Config
from dynamo_jax.config.choices import VerifierKind
from dynamo_jax.run.bucket import locations
from dynamo_jax.run.start import READING, Start
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, ArithmeticVerifier, solve, split_problems
from dynamo_jax.tasks.grading.extract import END_OF_THINK
from dynamo_jax.tasks.grading.known_golds import known_problem
from dynamo_jax.tasks.grading.verifier import Verifier
from dynamo_jax.tasks.overlap import shared_problems
from dynamo_jax.tasks.prompts import PromptSet, load_prompts, make_prompt_set
from dynamo_jax.tasks.read import Row
from dynamo_jax.tasks.rewards import Grader, Reopened, RewardGrader, Shaped
from dynamo_jax.tasks.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("dynamo_jax")


@dataclasses.dataclass(frozen=True)
class Task:
    """What `trainer.py` knows of the problem. `evals` are held out: their prompts are never trained on."""

    tokenizer: Tokenizer
    train: PromptSet
    evals: tuple[PromptSet, ...]
    verifier: Grader

    @property
    def fingerprints(self) -> list[str]:
        """Of the prompts to train on, then of those of each evaluation."""
        return [prompts.fingerprint for prompts in (self.train, *self.evals)]


def build_tokenizer(config: Config, now: datetime | None = None) -> Tokenizer:
    """The task's tokenizer, with the stop tokens of the policy. Raises `ValueError` for a folder that holds none.

    `now` is what its chat template gets as today's date, if it asks for it; None: the clock's.
    """
    if config.task.kind == "arithmetic":
        return ArithmeticTokenizer()
    return load_tokenizer(
        str(config.task.tokenizer),
        policy_folder=config.policy.load,
        chat_template_kwargs=config.task.chat_template_kwargs,
        now=now,
    )


def build_verifier(
    config: Config, killed_file: Path | None = None, *, reading: int = READING, opens_thinking: bool = False
) -> Grader:
    """The task's grader. Workers start with the first answer that needs one; those of a user's own reward, at once.

    With `opens_thinking` the prompts end inside an open `<think>`, and every response is judged with that in front. Of
    references of `reading` 1 a reward of the user's own gets lists as they stand. The newest answers that cost a worker
    its life are written to `killed_file`. Raises `ValueError` for a reward of the user's own that cannot be loaded.
    """
    if config.task.kind == "arithmetic":
        return ArithmeticVerifier()
    r = config.task.reward
    base: Grader = _base_grader(config, killed_file, reading)
    if opens_thinking:
        base = Reopened(base)
    if not (r.format_bonus or r.length_penalty):
        return base
    if r.length_limit <= r.length_free:
        raise ValueError(
            f"task.reward.length_limit = {r.length_limit} must be above task.reward.length_free = {r.length_free}. "
            "Raise it."
        )
    return Shaped(
        base, r.format_bonus, r.length_penalty, r.length_free, r.length_limit, opens_thinking=opens_thinking
    )  # fmt: skip


def _base_grader(config: Config, killed_file: Path | None, reading: int = READING) -> Verifier | RewardGrader:
    r, v = config.task.reward, config.verifier
    limits: dict[str, Any] = {"workers": v.workers, "timeout": v.timeout, "memory_mb": v.memory_mb}
    if r.kind in get_args(VerifierKind):
        return Verifier(**limits, kind=cast(VerifierKind, r.kind), killed_file=killed_file)
    if reading == 1:
        limits["whole_golds"] = True
    return RewardGrader(r.kind, **limits, killed_file=killed_file)


def killed_answers(config: Config) -> Path:
    """Where this process writes down the answers that cost a worker its life: each has a file of its own.

    Process 0 mirrors its working folder if the run is in a bucket. The others write where the checkpoints are.
    """
    places, index = locations(config.run_dir), jax.process_index()
    if index == 0:
        return places.work / "killed_answers.jsonl"
    return places.checkpoints.parent / f"killed_answers.{index}.jsonl"


def build_task(config: Config, start: Start | None = None) -> Task:
    """Read or make all that the config names, as a run that `start` says how to make prompts by; None: one of today.

    Raises `ValueError` naming the file and the line of what is wrong with the data.
    """
    now, reading = start or Start.today()
    tokenizer = build_tokenizer(config, now)
    if config.task.kind == "arithmetic":
        train, heldout = _arithmetic(config, tokenizer)
        return Task(tokenizer, train, (heldout,), build_verifier(config))
    held_out: list[Sequence[Row]] = []
    evals = eval_prompts(config, tokenizer, (), held_out.append, reading=reading)
    train = _read(config.task.train, tokenizer, config, reading, partial(_warn_of_overlap, config, evals, held_out))
    for prompts in evals:
        if prompts.dropped:
            log.warning(
                "%s: its scores count the %d left out as wrong. Raise task.max_prompt_tokens, or take them out of the "
                "file.", prompts.name, prompts.dropped,
            )  # fmt: skip
    opens = train.opens_thinking
    if opens and END_OF_THINK not in tokenizer.decode(tokenizer.encode(END_OF_THINK)):
        log.warning(
            "%s: its texts lack %s, a special token of it or unknown to it. As the prompts end inside an open "
            "<think>, no response can be seen to end its reasoning: all are wrong. Make it a token that is none.",
            config.task.tokenizer, END_OF_THINK,
        )  # fmt: skip
    verifier = build_verifier(config, killed_answers(config), reading=reading, opens_thinking=opens)
    return Task(tokenizer, train, evals, verifier)


def eval_prompts(
    config: Config,
    tokenizer: Tokenizer,
    files: Sequence[str],
    look: Callable[[Sequence[Row]], None] | None = None,
    *,
    reading: int = READING,
) -> tuple[PromptSet, ...]:
    """A prompt set for each of `files`; without files, the config's held-out prompts. `look` sees each file's rows.

    `reading` is how data files are read (`read.read_rows`).

    Raises `ValueError` naming the file and the line of what is wrong, or two files that would share a name.
    """
    if not files and config.task.kind == "arithmetic":
        return (_arithmetic(config, tokenizer)[1],)
    prompt_sets = tuple(_read([path], tokenizer, config, reading, look) for path in files or config.task.eval)
    names = [prompts.name for prompts in prompt_sets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two benchmark files are both called {name}: their results would be one. Rename a file.")
    return prompt_sets


def _arithmetic(config: Config, tokenizer: Tokenizer) -> tuple[PromptSet, PromptSet]:
    a = config.task.arithmetic
    problems = split_problems(config.seed, a.train_prompts, a.heldout_prompts, a.max_operations)
    train, heldout = (
        make_prompt_set(name, [(p, p, solve(p), tokenizer.encode(p)) for p in part])
        for name, part in zip(("arithmetic", "heldout"), problems, strict=True)
    )
    return train, heldout


def check_golds(config: Config) -> Callable[[Sequence[Row]], None]:
    """A check of rows: `ValueError`, with its place, for the first reference answer that nothing could ever equal.

    Answers that are known to be ungradable (`known_golds.py`) pass: they are listed with every evaluation.
    """

    def check(rows: Sequence[Row]) -> None:
        own = ":" in config.task.reward.kind
        # The user's function takes any text, as `exact` does: no worker needs to load it here.
        grader = RewardGrader("exact") if own else _base_grader(config, None)
        try:
            reasons = grader.unreadable([row.answer for row in rows])
        finally:
            grader.close()
        bad = [
            (row, why)
            for row, why in zip(rows, reasons, strict=True)
            if why is not None and known_problem(row.id, row.answer) is None
        ]
        if bad:
            (row, why), more = bad[0], len(bad) - 1
            others = f" {more} more rows are like it." if more else ""
            raise ValueError(f"{row.where}: {why.rstrip('.')}. Correct it, or take the row out.{others}")

    return check


def _warn_of_overlap(
    config: Config, evals: Sequence[PromptSet], held_out: Sequence[Sequence[Row]], train: Sequence[Row]
) -> None:
    if config.task.allow_overlap:
        return
    for prompts, rows, shared in zip(evals, held_out, shared_problems(train, held_out), strict=True):
        if shared:
            log.warning(
                "%s: %d of %d held-out problems are in the training data, too, the first of them at %s and at %s. Take "
                "them out of one of the two, or set task.allow_overlap=true.",
                prompts.name, len(shared), len(rows), shared[0][0].where, shared[0][1].where,
            )  # fmt: skip


def _read(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
    reading: int,
    look: Callable[[Sequence[Row]], None] | None = None,
) -> PromptSet:
    t, check_rows = config.task, check_golds(config)

    def check(rows: Sequence[Row]) -> None:
        check_rows(rows)
        if look is not None:
            look(rows)

    return load_prompts(
        paths,
        tokenizer,
        max_prompt_tokens=t.max_prompt_tokens,
        chat_template=t.chat_template,
        system_prompt=t.system_prompt,
        instruction=t.instruction,
        check=check,
        columns=t.columns,
        reading=reading,
    )
