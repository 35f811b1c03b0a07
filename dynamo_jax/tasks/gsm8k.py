"""The reward of GSM8K: the number after `####`, where the data set writes its answers."""

from __future__ import annotations

import re
from fractions import Fraction

from dynamo_jax.tasks.grading.numerals import NUMBER_WORDS, PART_WORDS
from dynamo_jax.tasks.grading.words import CHANGING_WORDS, changes

MAX_CHARS = 200  # of an answer; numbers are far shorter
_PLAIN = str.maketrans("\u2212\u2019", "-'")  # a minus sign, an apostrophe
_ANSWER = re.compile(
    r"""(?P<sign>[-+]?)\ ?(?:\\?[$€£]\ ?)?(?P<inner>[-+]?)
    (?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)
    (?:\ ?\\?[%$€£¢°]|[ckm]m|[km]g|m[lL]|lbs?|oz|ft|in|hrs?|mins?|secs?|[mk]ph|km/h)?
    (?P<words>(?:\ [A-Za-z][A-Za-z'/-]*)*)\ ?\.?""",
    re.VERBOSE,
)
# Words that make another number of it, or several, and letters that are no unit but a factor.
_CHANGING = re.compile(
    rf"\b(?:{CHANGING_WORDS}|{NUMBER_WORDS}|{PART_WORDS}|zero|one|and|at|to|point|squared|cubed|grand|bn|mn|mln|mil|pi"
    r"|[b-fi-kn-rt-z]|(?-i:M))\b",
    re.IGNORECASE,
)


def gsm8k(output: str, gold: str) -> float:
    """1 if the number after the last `####` is the reference number. No `####`, or not one number after it: 0.

    The rest of that line must be a number and nothing that changes it. Before it may stand a sign and a currency;
    thousands are set apart by commas in groups of three or not at all; after it may come a percent, degree or currency
    sign, a unit or other words, and a period: `-3`, `$1,234.00`, `50%`, `3 apples.`. A second number, an operator, a
    letter that multiplies or a word that counts makes it no answer: `3/4`, `3 or 4`, `3-4`, `3e5`, `3x`, `3.4.5`,
    `12,34`, `5 million`, `3 and a half`. Lines after that one do not count. The reference is read alike; it may leave
    out `####`.
    """
    found = hash_number(output)
    return float(found is not None and found == gold_number(gold))


def gold_number(gold: str) -> Fraction | None:
    """The number of a reference answer, with or without `####`. None if it has none."""
    return hash_number(gold if "####" in gold else f"#### {gold}")


def hash_number(text: str) -> Fraction | None:
    """The number after the last `####`, as `gsm8k` reads it; None if there is none."""
    _, mark, after = text.rpartition("####")
    line = " ".join(after.strip().partition("\n")[0].translate(_PLAIN).split())
    match = _ANSWER.fullmatch(line) if mark and len(line) <= MAX_CHARS else None
    if match is None or (match["sign"] and match["inner"]):
        return None
    if _CHANGING.search(match["words"]) or changes(match["words"]):
        return None
    value = Fraction(match["number"].replace(",", ""))
    return -value if "-" in match["sign"] + match["inner"] else value
