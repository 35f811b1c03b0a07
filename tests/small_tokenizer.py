"""A small tokenizer of whole words, as a Hugging Face folder."""

from collections.abc import Sequence
from pathlib import Path

WORDS = ("<unk>", "<eos>", "1", "2", "3", "+", "=", "?", "<think>", "[user]", "[assistant]", "28", "29")


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
