"""Small tokenizers: of characters, and of whole words as a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

WORDS = ("<unk>", "<eos>", "1", "2", "3", "+", "=", "?", "<think>", "[user]", "[assistant]", "28", "29")


class Characters:
    """A tokenizer whose tokens are code points, so that token counts are plain to see."""

    eos_id, stop_ids, pad_id, size = 0, (0,), 0, 0x110000

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        if messages[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


def save_tokenizer(folder: Path, template: str, words: Sequence[str] = WORDS) -> str:
    """Write the folder: a word's id is its place in `words`, of which the first two are `<unk>` and `<eos>`."""
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")  # noqa: S106
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")  # noqa: S106
    fast.chat_template = template
    fast.save_pretrained(folder)
    return str(folder)
