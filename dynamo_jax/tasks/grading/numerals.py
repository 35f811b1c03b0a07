"""Numbers in words, and words that scale or raise the value before them, as the formulas that they stand for.

`five million`, `2.5 "million"`, `3 "quarters"`, `5 "squared"`, `7 "(seven)"`. What is not clear stays as it is written.
Works on normalised text (see `latex.py`), in linear time.
"""

# ruff: noqa: SIM905 - a line of words reads better than a list

from __future__ import annotations

import re
from fractions import Fraction

from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_LARGE = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "quadrillion": 15, "quintillion": 18}
_EXPONENTS = _LARGE | {"hundred": 2, "lakh": 5, "crore": 7, "百万": 6, "千万": 7, "万": 4, "萬": 4, "亿": 8, "億": 8}
_SUFFIXES = {"k": 3, "M": 6, "mn": 6, "mln": 6, "bn": 9, "tn": 12}  # only in quotes: elsewhere they are letters
_DENOMINATORS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10, "eleventh": 11, "twelfth": 12, "twentieth": 20, "hundredth": 100, "thousandth": 1000,
    "ten-thousandth": 10**4, "hundred-thousandth": 10**5, "millionth": 10**6, "billionth": 10**9,
}  # fmt: skip
_POWERS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}

# Parts of regular expressions, for what else looks for such words.
NUMBER_WORDS = "|".join([*sorted(_ONES[2:], key=len, reverse=True), *_TENS])  # "one" is a pronoun, too
SCALE_WORDS = "|".join(f"{word}s?" for word in [*_EXPONENTS, "dozen"])
PART_WORDS = "hal(?:f|ves)|" + "|".join(f"{word}s?" for word in reversed(_DENOMINATORS) if word != "half")
PLURAL_PARTS = "halves|" + "|".join(f"{word}s" for word in reversed(_DENOMINATORS) if word != "half")

_SCALE = re.compile(
    rf'(?<=[\dA-Za-z}})!|]) ?(?P<quote>"?)\s?(?:(?P<scales>(?:{SCALE_WORDS})(?: ?(?:{SCALE_WORDS})){{0,3}})'
    rf'|(?P<part>{PART_WORDS})|(?-i:(?P<suffix>{"|".join(_SUFFIXES)})))(?![A-Za-z-])(?P<close> ?"?)',
    re.IGNORECASE,
)
_PART = re.compile(rf"(?:{PART_WORDS})(?![a-z])")
_AND_PART = re.compile(rf"and (?:an?|one|{NUMBER_WORDS}) (?:{PART_WORDS})(?![a-z])")
_SYMBOL = re.compile(r"(?:\\[a-zA-Z]+|(?<![A-Za-z])[A-Za-z])$")
_OPERATOR = re.compile(r"\\(?:c?dot|times|le|ge|ne|in|cup|cap|approx|pm|mp|to|sim)$")
_ONE = re.compile(r"(?<![\d.,}\w])1$")
_NEXT_VALUE = re.compile(r" ?(?:\.?\d|\((?=[\d\\])|\\(?:frac|sqrt|binom))")
_MIXED = re.compile(
    rf'(?<![\d.,}}/])(?P<whole>\d+) ?(?P<quote>"?) ?and (?P<top>an?|one|{NUMBER_WORDS})[ -](?P<part>{PART_WORDS})'
    r'(?![A-Za-z-])(?P<close> ?"?)',
    re.IGNORECASE,
)
_POWER = re.compile(r' ?"? ?(?<![A-Za-z-])(squared|cubed|factorial) ?(?:"|(?=[,;=<>)\]}+*/-])|$)', re.IGNORECASE)
_BASE = re.compile(
    r"(?:^|[,;=<>&(\[{]|\\(?:le|ge|ne|in|cup|approx)(?![a-zA-Z]))\s?"
    r"(?P<base>(?:\d+(?:\.\d+)?|[a-zA-Z]|\\(?!le|ge|ne|in|cup|approx)[a-zA-Z]+|\\frac\{[\w ]+\}\{[\w ]+\}|\([^()]*\))"
    r"(?:\^(?:\w|\{\w+\}))?)$"
)
_SIMPLE = re.compile(r"\d+|[a-zA-Z]")
_NUMBER = r"(?P<number>\d{1,15}(?:,\d{3}){0,5}(?:\.\d{1,15})?|\\frac\{\d{1,9}\}\{\d{1,9}\})"
_WORDS = r'"? ?(?P<words>[A-Za-z][A-Za-z -]{2,}) ?"?'
_NAMED_AFTER = re.compile(rf'(?<![\d.,])(?P<sign>-?) ?{_NUMBER} ?(?P<quote>"?) ?\( ?{_WORDS} ?\)(?P<close> ?"?)')
_NAMED_BEFORE = re.compile(rf'(?:^|(?<==)) ?{_WORDS} ?\( ?{_NUMBER} ?\)(?=$|[ ".,;=])')
_ALONE = re.compile(r'((?:^|[=,(]) ?\(|^|[=,]) ?"? ?([A-Za-z][A-Za-z -]{2,}) ?"? ?(?=[=,)]|$)')
MAX_WORDS = 120  # characters of a number in words


def spell_out(text: str) -> str:
    """The formula that a text with numbers in words stands for: see the module's docstring."""
    text = _leading(text)
    if "(" in text:
        text = _NAMED_AFTER.sub(_named_after, text)
        text = _NAMED_BEFORE.sub(_named_before, text)
    if "(" in text or "=" in text or "," in text:
        text = _ALONE.sub(_alone, text)
    if "and " in text:
        text = _MIXED.sub(_mixed, text)
    return _raised(_SCALE.sub(_scaled, text))


def word_number(text: str) -> int | None:
    """`forty-two`, `two thousand and five`: a whole number in words; None for anything else."""
    if len(text) > MAX_WORDS or not text.isascii():
        return None
    words = text.replace("-", " ").lower().split()
    value, used = _number(words)
    return value if words and used == len(words) else None


def _number(words: list[str]) -> tuple[int, int]:
    """The whole number that the words begin with, and how many of them say it."""
    total = group = used = 0
    below = 10**30  # the groups of thousands come in falling order
    for index, word in enumerate(words):
        if word in _ONES:
            number = _ONES.index(word)
            fits = group % 100 == 0 if number >= 10 else group % 10 == 0 and group % 100 != 10
            if not fits or (number == 0 and index):
                break
            group += number
        elif word in _TENS:
            if group % 100:
                break
            group += 10 * (_TENS.index(word) + 2)
        elif word == "hundred":
            if not 0 < group < 100:
                break
            group *= 100
        elif word in _LARGE:
            scale = 10 ** _LARGE[word]
            if not 0 < group < 1000 or scale >= below:
                break
            total, group, below = total + group * scale, 0, scale
        elif word == "and" and used:
            continue
        else:
            break
        used = index + 1
        if word == "zero":
            break
    return total + group, used


def _leading(text: str) -> str:
    """`five million dollars` with digits; `five dollars` stays, since words may be the answer."""
    if len(text) > MAX_WORDS or not (text[:1].isalpha() or text[:1] == '"'):
        return text
    words = text.replace('"', " ").replace("-", " ").split()
    if not words or not all(word.isascii() and word.isalpha() for word in words):
        return text
    low = [word.lower() for word in words]
    if low == ["half"]:
        return "\\frac{1}{2}"
    if low[0] == "half" and low[1:2] in (["a"], ["an"], ["one"]) and _scales(low[2:3]):
        return f'\\frac{{1}}{{2}} "{" ".join(words[2:])}"'
    if low[0] in ("a", "an") and (_scales(low[1:2]) or (low[1:2] and low[1] in _DENOMINATORS)):
        low[0] = "one"
    if low[0] in ("minus", "negative") and (number := word_number(" ".join(low[1:]))):
        return f"-{number}"
    value, used = _number(low)
    if not used or used == len(words):
        return str(value) if used else text
    following = " ".join(low[used:])
    large = any(word in _LARGE for word in low[:used])
    scaled = _scales(low[used : used + 1])
    if scaled and (large or "and" in low[:used]):
        return text  # one million and two million
    counts = large or scaled or low[used] in _POWERS or _PART.match(following) or _AND_PART.match(following)
    return f'{value} "{" ".join(words[used:])}"' if counts else text


def _scales(words: list[str]) -> bool:
    return bool(words) and re.fullmatch(SCALE_WORDS, words[0]) is not None


def _scaled(match: re.Match[str]) -> str:
    """The factor that a word after a value stands for."""
    text, start = match.string, match.start()
    before = text[max(0, start - 12) : start]
    if text.count('"', 0, start) % 2 or _NEXT_VALUE.match(text, match.end()):
        return match[0]  # inside other words; before a second value
    if not match["quote"] and (match["suffix"] or before[-1].isalpha()):
        return match[0]  # 5 k is a product
    if match["suffix"] and text[match.end() : match.end() + 2].strip()[:1] in ("\\", "_"):
        return match[0]  # kiloohms, solar masses
    if before[-1].isalpha() and (not _SYMBOL.search(before) or _OPERATOR.search(before)):
        return match[0]
    if match["part"]:
        if match["part"].lower() in _DENOMINATORS and not _ONE.search(before):
            return match[0]
        factor = f"\\frac{{1}}{{{_denominator(match['part'])}}}"
    elif match["suffix"]:
        factor = f"10^{{{_SUFFIXES[match['suffix']]}}}"
    else:
        factor = " \\cdot ".join(map(_factor, re.findall(SCALE_WORDS, match["scales"].lower())))
    return f" \\cdot {factor}" + _reopened(match)


def _factor(word: str) -> str:
    word = word.removesuffix("s")
    return "12" if word == "dozen" else f"10^{{{_EXPONENTS[word]}}}"


def _denominator(word: str) -> int:
    word = word.lower()
    return 2 if word == "halves" else _DENOMINATORS[word if word in _DENOMINATORS else word.removesuffix("s")]


def _reopened(match: re.Match[str]) -> str:
    """What follows a word that was taken out of its quotes: their rest is in quotes still."""
    closed = '"' in match["close"]
    if match["quote"]:
        return " " if closed else ' "'
    return match["close"]


def _mixed(match: re.Match[str]) -> str:
    """`5 and a half` is `5\\frac{1}{2}`."""
    top = 1 if match["top"].lower() in ("a", "an") else word_number(match["top"])
    bottom = _denominator(match["part"])
    if top is None or top >= bottom:
        return match[0]
    return f"{match['whole']}\\frac{{{top}}}{{{bottom}}}" + _reopened(match)


def _raised(text: str) -> str:
    """`5 "squared"`; not after a unit, nor where it is open how much of the formula is meant."""
    out, position = "", 0
    for match in _POWER.finditer(text):
        before = text[position : match.start()]
        # The base is looked for in a bounded piece; the mark stands for what is before it.
        found = _BASE.search(before if len(before) <= 80 else "+" + before[-80:])
        if found is None:
            continue
        base = found["base"]
        if not _SIMPLE.fullmatch(base):
            before = f"{before.removesuffix(base)}({base})"
        out, position = out + before + _POWERS[match[1].lower()] + " ", match.end()
    return (out + text[position:]).strip() if position else text


def _named_after(match: re.Match[str]) -> str:
    """`7 (seven)`."""
    words = match["words"]
    if match["sign"]:
        words = re.sub(r"^(?:minus|negative) ", "", words)
    if _worth(words) != _worth(match["number"]):
        return match[0]
    return match["sign"] + match["number"] + _reopened(match)


def _named_before(match: re.Match[str]) -> str:
    """`seven (7)`."""
    return match["number"] if _worth(match["words"]) == _worth(match["number"]) else match[0]


def _alone(match: re.Match[str]) -> str:
    """`seven` in `(seven, eight)` and `x = seven`: elsewhere than alone, words would be taken for a name."""
    number = word_number(match[2])
    return match[0] if number is None else f"{match[1]} {number} "  # "2, 500" is no thousand


def _worth(text: str) -> Fraction | None:
    """The value of a number in words or digits; None for other words."""
    try:
        return evaluate(spell_out(text.replace(",", "")))
    except NotRationalError:
        return None
