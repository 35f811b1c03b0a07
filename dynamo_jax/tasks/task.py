"""A task: the prompts to train and to evaluate on, the tokenizer they are written with, and who judges the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

from dynamo_jax.config import Config
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, ArithmeticVerifier, solve, split_problems
from dynamo_jax.tasks.prompts import PromptSet, load_prompts, make_prompt_set
from dynamo_jax.tasks.tokenizer import Tokenizer, load_tokenizer
from dynamo_jax.tasks.verifier import Verifier


class Grader(Protocol):
    """`Verifier`, or anything that grades like it."""

    @property
    def counts(self) -> Mapping[str, int]: ...

    def grade_batch(self, pairs: Sequence[tuple[str, str]]) -> list[bool]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What `trainer.py` knows of the problem. `evals` are held out: their prompts are never trained on."""

    tokenizer: Tokenizer
    train: PromptSet
    evals: tuple[PromptSet, ...]
    verifier: Grader


def build_tokenizer(config: Config) -> Tokenizer:
    """The task's tokenizer. Raises `ValueError` for a folder that holds none."""
    if config.task.kind == "arithmetic":
        return ArithmeticTokenizer()
    return load_tokenizer(str(config.task.tokenizer))


def build_verifier(config: Config) -> Grader:
    """The task's grader. Workers start with the first answer that needs one."""
    if config.task.kind == "arithmetic":
        return ArithmeticVerifier()
    v = config.verifier
    return Verifier(workers=v.workers, timeout=v.timeout, memory_mb=v.memory_mb)


def build_task(config: Config) -> Task:
    """Read or make all that the config names.

    Raises `ValueError` naming the file and the line of what is wrong with the data.
    """
    tokenizer = build_tokenizer(config)
    if config.task.kind == "arithmetic":
        train, heldout = _arithmetic(config, tokenizer)
        return Task(tokenizer, train, (heldout,), build_verifier(config))
    train = _read(config.task.train, tokenizer, config)
    return Task(tokenizer, train, eval_prompts(config, tokenizer, ()), build_verifier(config))


def eval_prompts(config: Config, tokenizer: Tokenizer, files: Sequence[str]) -> tuple[PromptSet, ...]:
    """A prompt set for each of `files`; without files, the config's held-out prompts.

    Raises `ValueError` naming the file and the line of what is wrong, or two files that would share a name.
    """
    if not files and config.task.kind == "arithmetic":
        return (_arithmetic(config, tokenizer)[1],)
    prompt_sets = tuple(_read([path], tokenizer, config) for path in files or config.task.eval)
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


def _read(paths: Sequence[str], tokenizer: Tokenizer, config: Config) -> PromptSet:
    t = config.task
    return load_prompts(
        paths,
        tokenizer,
        max_prompt_tokens=t.max_prompt_tokens,
        chat_template=t.chat_template,
        system_prompt=t.system_prompt,
        instruction=t.instruction,
    )
