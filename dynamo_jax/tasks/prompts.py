"""Prompts: read, rendered, tokenized and filtered once, then drawn in batches through grain, in a resumable order."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dynamo_jax.batch import PromptBatch
from dynamo_jax.config import ColumnsConfig
from dynamo_jax.run.start import READING
from dynamo_jax.tasks.chat import Message
from dynamo_jax.tasks.files import set_name
from dynamo_jax.tasks.grading.extract import opens_thinking
from dynamo_jax.tasks.read import Row, read_rows
from dynamo_jax.tasks.tokenizer import Tokenizer

logger = logging.getLogger("dynamo_jax")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem as the policy sees it: `text` is what `tokens` spell, `answer` what its completions are graded by."""

    id: str
    text: str
    answer: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class PromptSet:
    """N prompts in a fixed order. Made by `load_prompts` or `make_prompt_set`.

    A prompt's place in `prompts` is its `index_P` in batches, the key of its statistics. `dropped_ids` are the rows
    left out for their length. `fingerprint` (SHA-256, hex) changes with any id, text, answer or token and with their
    order: a resume compares it to notice that the data has changed.
    """

    name: str
    prompts: tuple[Prompt, ...]
    dropped_ids: tuple[str, ...]
    fingerprint: str

    @property
    def dropped(self) -> int:
        return len(self.dropped_ids)

    @property
    def opens_thinking(self) -> bool:
        """Do all prompts end inside an open `<think>`, by the chat template or the instruction?"""
        return all(opens_thinking(prompt.text) for prompt in self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)


def make_prompt_set(
    name: str, rows: Iterable[tuple[str, str, str, Sequence[int]]], *, dropped_ids: Sequence[str] = ()
) -> PromptSet:
    """A prompt set of ready rows `(id, text, answer, tokens)`.

    Raises ValueError if there is no row, an id occurs twice or a row has no tokens.
    """
    prompts = tuple(Prompt(id, text, answer, tuple(int(t) for t in tokens)) for id, text, answer, tokens in rows)
    if not prompts:
        raise ValueError(f"prompt set {name!r}: has no prompts. Give at least one.")
    digest, seen = hashlib.sha256(), set()
    for p in prompts:
        if p.id in seen:
            raise ValueError(f"prompt set {name!r}: id {p.id!r} occurs twice. Give every prompt its own id.")
        if not p.tokens:
            raise ValueError(f"prompt set {name!r}: prompt {p.id!r} has no tokens. A prompt needs at least one.")
        seen.add(p.id)
        digest.update(json.dumps([p.id, p.text, p.answer, p.tokens]).encode())
    return PromptSet(name, prompts, tuple(dropped_ids), digest.hexdigest())


def load_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_prompt_tokens: int,
    chat_template: bool,
    system_prompt: str | None,
    instruction: str,
    check: Callable[[Sequence[Row]], None] | None = None,
    columns: ColumnsConfig | None = None,
    reading: int = READING,
) -> PromptSet:
    """Read `paths`, render, tokenize, and leave out prompts over `max_prompt_tokens`.

    Layouts of files, `columns` and `reading`: `read.read_rows`.

    With `chat_template` a text becomes a user message, and the tokenizer's template renders the chat up to where the
    answer begins; messages in the data are used as they are, with `system_prompt` in front if they bring none.
    `instruction` follows the problem (the last user message) exactly as it is written: begin it with a space or a line
    break. Without `chat_template` the prompt is the problem and the instruction and nothing else.

    The name is the file's without its ending, a folder's, or what is no wildcard of a glob; of several they are joined
    by "+". The prompts left out are in `dropped_ids` and their number is logged as a warning.

    `check` sees all rows first and may raise.

    Raises ValueError, with file, line and remedy, for bad files and rows, for chat messages or a system prompt without
    a chat template, and if no prompt is short enough.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if system_prompt is not None and not chat_template:
        raise ValueError(
            f"task.system_prompt = {system_prompt!r} needs a chat template, and task.chat_template is false. "
            "Set task.chat_template=true, or put the text into the problems."
        )
    name = set_name(paths)
    kept, dropped_ids, lengths = [], [], []
    rows = read_rows(paths, columns=columns, reading=reading)
    if check is not None:
        check(rows)
    for row in rows:
        text = _render(row, tokenizer, chat_template, system_prompt, instruction)
        tokens = tokenizer.encode(text)
        lengths.append(len(tokens))
        if len(tokens) <= max_prompt_tokens:
            kept.append((row.id, text, row.answer, tokens))
        else:
            dropped_ids.append(row.id)
    if not kept:
        raise ValueError(
            f"{name}: all {len(rows)} prompts are longer than task.max_prompt_tokens = {max_prompt_tokens}; the "
            f"shortest has {min(lengths)} tokens, the longest {max(lengths)}. Raise task.max_prompt_tokens."
        )
    if dropped_ids:
        logger.warning(
            "%s: left out %d of %d prompts (%.1f%%), which are longer than task.max_prompt_tokens = %d; "
            "the longest has %d tokens",
            name, len(dropped_ids), len(rows), 100 * len(dropped_ids) / len(rows), max_prompt_tokens, max(lengths),
        )  # fmt: skip
    return make_prompt_set(name, kept, dropped_ids=dropped_ids)


def _render(row: Row, tokenizer: Tokenizer, chat: bool, system_prompt: str | None, instruction: str) -> str:
    if not chat:
        if not isinstance(row.prompt, str):
            raise ValueError(
                f"{row.where}: the prompt is a list of chat messages, and task.chat_template is false. "
                "Set task.chat_template=true, or make the prompt a text."
            )
        return row.prompt + instruction
    messages: list[Message]
    if isinstance(row.prompt, str):
        messages = [{"role": "user", "content": row.prompt}]
    else:
        messages = [dict(message) for message in row.prompt]
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    messages[last_user]["content"] += instruction
    if system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        return tokenizer.render_chat(messages)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def pad_prompts(
    prompts: Sequence[Prompt], max_prompt_tokens: int, pad_id: int, *, index: Sequence[int] | None = None
) -> PromptBatch:
    """A batch of `prompts` in their order, tokens left-padded to L = `max_prompt_tokens`.

    `index` (P ints) becomes `index_P`; None means 0 .. P-1, right if `prompts` is a whole set or its statistics are not
    kept, as in evaluation. Raises ValueError if a prompt has more than `max_prompt_tokens` tokens.
    """
    tokens_PL = np.full((len(prompts), max_prompt_tokens), pad_id, np.int32)
    for row_L, prompt in zip(tokens_PL, prompts, strict=True):
        if len(prompt.tokens) > max_prompt_tokens:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens, and max_prompt_tokens = {max_prompt_tokens}. "
                "Raise task.max_prompt_tokens, or load the prompts with the smaller limit."
            )
        row_L[max_prompt_tokens - len(prompt.tokens) :] = prompt.tokens
    return PromptBatch(
        index_P=np.asarray(range(len(prompts)) if index is None else index, np.int32),
        tokens_PL=tokens_PL,
        length_P=np.asarray([len(prompt.tokens) for prompt in prompts], np.int32),
        ids=tuple(prompt.id for prompt in prompts),
        texts=tuple(prompt.text for prompt in prompts),
        answers=tuple(prompt.answer for prompt in prompts),
    )


class PromptIterator(Iterator[PromptBatch]):
    """Batches of P = `batch` prompts without end, in an order that depends on `seed` and the epoch only.

    Every epoch is a permutation of the set. Batches run on across the end of an epoch, so that no prompt is left out;
    the one batch that spans two epochs may hold a prompt twice. Each process of a multi-host run makes the same
    batches. There are no worker threads: a batch of 512 takes 7 ms.

    Raises ValueError if the set has fewer prompts than a batch.
    """

    def __init__(self, prompt_set: PromptSet, *, batch: int, seed: int, max_prompt_tokens: int, pad_id: int) -> None:
        import grain  # here because it takes more than a second

        if len(prompt_set) < batch:
            raise ValueError(
                f"{prompt_set.name}: has {len(prompt_set)} prompts ({prompt_set.dropped} were left out for their "
                f"length), and a batch takes {batch}. Set rollout.prompts to at most {len(prompt_set)}, or give more "
                "data."
            )
        self._set = prompt_set
        self._max_prompt_tokens = max_prompt_tokens
        self._pad_id = pad_id
        # What makes the order; a position means nothing under another one.
        self._order = {"seed": seed, "batch": batch, "fingerprint": prompt_set.fingerprint}
        # repeat after shuffle: grain then shuffles each epoch by a seed of its own.
        self._index_P_of_batch = grain.MapDataset.range(len(prompt_set)).seed(seed).shuffle().repeat().batch(batch)
        # Our own counter over grain's random access: grain's iterator over it overflows for batches of one (0.2.18).
        self._next_batch = 0
        self._batch = batch

    def __next__(self) -> PromptBatch:
        index_P = self._index_P_of_batch[self._next_batch]
        self._next_batch += 1
        prompts = [self._set.prompts[i] for i in index_P]
        return pad_prompts(prompts, self._max_prompt_tokens, self._pad_id, index=index_P)

    @property
    def drawn(self) -> int:
        """Prompts drawn so far."""
        return self._next_batch * self._batch

    def state(self) -> dict[str, Any]:
        """The position, as plain JSON types: what `restore` needs to go on with the batch after the last one drawn."""
        return {"next_batch": self._next_batch, **self._order}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where the iterator that gave `state` stood, in whichever process.

        Raises ValueError, with both values and the remedy, if seed, batch or data differ from that iterator's.
        """
        for key, now in self._order.items():
            if state.get(key) != now:
                raise ValueError(
                    f"{self._set.name}: the saved data position has {key} = {state.get(key)!r}, this run has {now!r}. "
                    "Resume with the same data, seed and rollout.prompts, or start a new run folder."
                )
        position = state.get("next_batch")
        if type(position) is not int or position < 0:
            raise ValueError(
                f"{self._set.name}: the saved data position has next_batch = {position!r}, not a batch number. "
                "Resume from another checkpoint, or start a new run folder."
            )
        self._next_batch = position
