"""Text to token ids and back: the interface that the package uses, and the tokenizers of Hugging Face folders."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("dynamo_jax")

UNKNOWN_ID = "\ufffd"  # in a text: an id that the tokenizer has no token for

_TEXT_PARTS = ("decoder", "generator", "text_config")  # of a config.json; the first that is there, as in transformers
_LARGEST_ID = 2**31 - 1  # ids are int32
# What a template raises, beside jinja2's own errors, on messages or values that it was not written for.
_TEMPLATE_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError)


class Tokenizer(Protocol):
    """What the package asks of a tokenizer; the built-in task brings its own, `load_tokenizer` wraps the real ones."""

    @property
    def eos_id(self) -> int:
        """The end-of-sequence token."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion, `eos_id` first, without repetition."""

    @property
    def pad_id(self) -> int:
        """Fills unused positions. It may equal `eos_id`, so lengths are carried explicitly, never read off padding."""

    @property
    def size(self) -> int:
        """The largest id + 1. The policy's vocabulary is at least this large."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; no begin- or end-of-sequence token is added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out.

        Each id without a token, beyond the last or in a gap, becomes `UNKNOWN_ID`: a policy can sample it. Left out, it
        would join what stands on its two sides to a text that nobody sampled, and that may be right.
        """

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Messages `{role, content}` as one text that ends where the assistant's answer begins.

        Raises ValueError if the tokenizer has no chat template or its template refuses the messages.
        """


class HFTokenizer:
    """A `transformers` tokenizer as a `Tokenizer`. Made by `load_tokenizer`."""

    def __init__(
        self, folder: Path, inner: Any, stops: Sequence[int], values: Mapping[str, Any], now: datetime | None
    ) -> None:
        self._folder = folder
        self._inner = inner
        self._values = dict(values)
        self._now = now
        if inner.eos_token_id is None:
            raise ValueError(
                f"{folder}: the tokenizer has no end-of-sequence token, so a completion could not end. "
                'Set "eos_token" in its tokenizer_config.json.'
            )
        self.eos_id = int(inner.eos_token_id)
        self.pad_id = self.eos_id if inner.pad_token_id is None else int(inner.pad_token_id)
        self._has_token = frozenset(inner.get_vocab().values())
        self.size = max(self._has_token) + 1
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *stops, *self._end_of_turn()]))

    def encode(self, text: str) -> list[int]:
        # A rendered chat already holds whatever special tokens its template wants.
        return [int(i) for i in self._inner.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        parts = groupby(map(int, ids), self._has_token.__contains__)
        return "".join(self._text(list(part)) if known else UNKNOWN_ID * len(list(part)) for known, part in parts)

    def _text(self, ids: list[int]) -> str:
        # The clean-up would turn "a , b" into "a, b": a graded text must be the text that was sampled.
        return str(self._inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        import jinja2

        if not self._inner.chat_template:
            raise ValueError(
                f"{self._folder}: the tokenizer has no chat template. Set task.chat_template=false, or use the "
                "tokenizer of a chat model."
            )
        try:
            return str(self._apply_template(messages, add_generation_prompt=True))
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
            values = f" and task.chat_template_kwargs = {json.dumps(self._values)}" if self._values else ""
            raise ValueError(
                f"{self._folder}: the tokenizer's chat template refuses the messages with roles "
                f"{[m['role'] for m in messages]}{values}: {_one_line(error)}. Change them, "
                "or leave out task.system_prompt if the template takes no system message."
            ) from None

    def _apply_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> Any:
        template = self._inner.get_chat_template()
        if self._now is not None and "strftime_now" in template:
            template = _dated(template, self._now)
        return self._inner.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._values,
        )

    def _end_of_turn(self) -> list[int]:
        """The special token that the chat template writes right after an assistant's message: [id], or [] if none.

        A chat model ends its answers with it, and it often differs from the tokenizer's end-of-sequence token (in
        Qwen2.5-Math <|im_end|> and <|endoftext|>, of which generation_config.json lists only the latter).
        """
        import jinja2

        if not self._inner.chat_template:
            return []
        answer = "dynamo-jax-answer"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
        try:
            text = self._apply_template(messages, add_generation_prompt=False)
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS):
            return []  # a template that takes no assistant message says nothing about how one ends
        inner = self._inner
        special = {i for i, token in inner.added_tokens_decoder.items() if token.special} | set(inner.all_special_ids)
        for token in self.encode(text.rpartition(answer)[2]):
            if token in special:
                return [token]
            if self._inner.decode([token]).strip():
                return []
        return []


def _dated(template: str, now: datetime) -> str:
    """`template` as a text of its own, in which `strftime_now(...)` gives `now`, whatever the clock says.

    transformers passes plain values alone to a template, no function, but keeps each compiled text: the function is put
    there. A first line of comment, which renders to nothing, sets this text apart from that of the same template with
    the clock.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    dated = f"{{# {now.isoformat()} #}}\n{template}"
    _compile_jinja_template(dated).globals["strftime_now"] = now.strftime
    return dated


def load_tokenizer(
    folder: str | Path,
    *,
    policy_folder: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> Tokenizer:
    """The tokenizer of a local Hugging Face folder; the network is never asked, code in the folder never run.

    Completions end with its end-of-sequence token, with what its chat template ends a turn with, and with the
    `eos_token_id` of its generation_config.json or, where there is none, of its config.json. What these files of
    `policy_folder` name counts, too: the policy may come from another folder, and ends its answers as it was taught.

    `chat_template_kwargs` are JSON values for variables of the chat template. With `now`, a template that asks for
    today's date (`strftime_now`) gets that moment at every call; without it, the clock's.

    Raises ValueError, with the folder and the remedy, if the folder is missing, holds no (or an incomplete) tokenizer,
    the tokenizer has no end-of-sequence token, or what one of these files names is no token.
    """
    folder = Path(folder)
    remedy = "Point task.tokenizer at a folder with a model's tokenizer files (tokenizer_config.json and tokenizer.json"
    remedy += ", or vocab.json and merges.txt)."
    if not folder.is_dir():
        # Without this check transformers would take the path for the name of a repository to download.
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}. {remedy}")
    folders = [folder] if policy_folder is None else [folder, Path(policy_folder)]
    stops = [i for each in folders for i in _generation_stops(each)]
    import transformers  # here because it takes seconds
    from huggingface_hub.errors import StrictDataclassError

    try:
        inner = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # The Rust tokenizers raise Exception itself on a broken file; any other type not listed here is our bug.
        file_errors = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError)
        if type(error) is not Exception and not isinstance(error, file_errors):
            raise
        raise ValueError(f"{folder}: holds no readable tokenizer: {_one_line(error)}. {remedy}") from error
    # From a config without a vocabulary transformers makes a tokenizer that encodes every text to nothing.
    if not inner.encode("1 + 2 = 3", add_special_tokens=False):
        raise ValueError(f"{folder}: holds a tokenizer without a vocabulary. {remedy}")
    values = chat_template_kwargs or {}
    template = inner.chat_template or ""
    text = template if isinstance(template, str) else "\n".join(template.values())
    for name in values if text else ():
        if not re.search(rf"\b{re.escape(name)}\b", text):
            log.warning("%s: its chat template has no variable %s, which task.chat_template_kwargs sets.", folder, name)
    return HFTokenizer(folder, inner, stops, values, now)


def _generation_stops(folder: Path) -> list[int]:
    """The stop tokens that `transformers` generates with from this folder: `eos_token_id`, as a list.

    They are those of generation_config.json, even if it names none; without this file, those of config.json, or of its
    part about the text model where it names none itself.
    """
    path = folder / "generation_config.json"
    if path.exists():
        return _stop_ids(path, "eos_token_id", _read_object(path).get("eos_token_id"))
    path = folder / "config.json"
    tree = _read_object(path) if path.exists() else {}
    if tree.get("eos_token_id") is not None:
        return _stop_ids(path, "eos_token_id", tree["eos_token_id"])
    part = next((name for name in _TEXT_PARTS if isinstance(tree.get(name), dict) and tree[name]), None)
    return _stop_ids(path, f"{part}.eos_token_id", tree[part].get("eos_token_id")) if part else []


def _read_object(path: Path) -> dict[str, Any]:
    remedy = "Copy it again from the model, or delete it."
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}. {remedy}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: holds a {type(tree).__name__}, not a JSON object. {remedy}")
    return tree


def _stop_ids(path: Path, key: str, value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i <= _LARGEST_ID for i in ids):
        raise ValueError(f"{path}: {key} = {json.dumps(value)} is neither an id nor a list of ids. Correct it.")
    return ids


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(". ")
