"""The answer of a text that marks it with words alone: after a cue such as "the answer is", or its last value.

Emphasis (`**73**`, `__73__`) does not count. After the last cue the answer is the first value of the sentence, with
those that "and", "or" or a comma join to it and without the remark that follows (`remarks.py`). Words that make another
value of it ("42 million", "less than 42") stay, so that they are compared. Without a cue: a last line that is nothing
but a formula, else the last formula or number. Linear time.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from typing import NamedTuple

from dynamo_jax.tasks.grading import east_asian
from dynamo_jax.tasks.grading.remarks import denied, end_of_value, masked, second_thought

_GAP = r"(?:\\[()\[\]]|[\s$*]|\\[,;: !]|\\q?quad)*+"
JOIN = re.compile(
    rf"{_GAP}(?:[,\uff0c{east_asian.JOINS}]|(?:,\s*)?(?:\\text\s*\{{\s*)?\b(?:and|or)\b(?:\s*\}})?){_GAP}"
    r"(?:[a-zA-Z](?:_\{?\w\}?)?\s*=\s*)?"
)
_CUE = r"(?:answers?|choice|option)\s{0,4}\**\s{0,4}(?:is|are|[:\uff1a])(?![a-z])\s{0,4}[:\uff1a]?|####"
# By whether the text is ASCII alone, which saves a third of the time.
_CUES = {True: re.compile(_CUE, re.IGNORECASE), False: re.compile(f"{_CUE}|{east_asian.CUE}", re.IGNORECASE)}
_FORMULA = re.compile(r"\$\$|(?<!\\)\$|\\\(|\\\)|\\\[|\\\]")
_PRICE, _NEXT_PRICE = re.compile(r"\d"), re.compile(r"[\s(+*/=<,\u2013\u2014-]\$[\w\\-]")
_CLOSERS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_NUMBER = re.compile(
    rf"(?<!\.)(?<![^\W{east_asian.LETTERS}])[-+\u2212]?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d.])|\d*\.\d+|\d+)(?:\.\d+)?(?:/\d+)?%?"
)
# A line that is one formula without any marks: no words but those that LaTeX commands are made of.
_BARE_LINE = re.compile(r"[-+]?(?:\\[a-zA-Z]+|[-+*/^_=<>(){}\[\],.!|:%\s\d]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]))*+")
_IS = re.compile(r"\b(?:is|are|was|equals|be|to)\b|=", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[\u3002\uff01\uff1f]|(?<!\.)[.?](?=\s|$)|!(?=\s|$)(?! ?[-+*/^=]| [a-z])")
_ANNOUNCED = re.compile(r"(?:\b(?:is|are|was|equals|be|to|by)|[:=])\s*\Z", re.IGNORECASE)
# What stands before and after an answer and is no part of it. A period before it may be one.
_BEFORE = " \t\r\n*`,;:\uff0c\uff1b\uff1a\u3001\u300c\u300d\u300e\u300f"
_AFTER = _BEFORE + ".\u3002\uff0e"
# Emphasis: its marks stand against what they mark, and not against what is outside. `2**3 + 4**5` has none.
_EMPHASIS = re.compile(
    r"(?<![a-zA-Z0-9*`^\\)}\]])(?<![\d)}\]]\s)(\*{1,3}|`)(?=[^\s*`])([^*`\n]{1,300})(?<=\S)\1(?![a-zA-Z0-9*`])"
    r"|(?<![!-~])(_{1,3})(?=[^\s_{])([^_\n]{1,300})(?<=\S)\3(?![a-zA-Z0-9_])"
    r"|</?(?:b|i|u|em|strong|mark)>|(?<![\w\\}$])~~(?=[^\s~])[^~\n]{1,300}(?<=\S)~~(?!\w)",  # struck out: it is gone
    re.IGNORECASE,
)
_SCALE = (
    r"(?:hundreds?|thousands?|(?:m|b|tr)illions?|lakhs?|crores?|dozens?|hal(?:f|ves)|squared|cubed|factorial|"
    r"(?:third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth|millionth)s?)(?![a-zA-Z])"
)
_SCALED = re.compile(rf"(?:\s*{_SCALE})+", re.IGNORECASE)
# Before and behind a number that is no part of a formula, and the rest of a formula that has no spaces.
_ALONE_BEFORE = re.compile(
    r"\A\Z|[\s=(\[:,;\"'$|~\u2000-\u206f\u20a0-\u20bf\u2192\u2248\u2600-\u27bf\u3000-\uffff\U0001f000-\U0001faff]\Z"
)
_GOES_ON = re.compile(r"[a-zA-Z\\^_({]")
_RUN_BEFORE = re.compile(rf"[^\s{east_asian.LETTERS}]+\Z")
_RUN_AFTER = re.compile(rf"[^\s{east_asian.LETTERS}]+(?<![.,;:!?)])")
# Words before a number that only lead to it: two or more, or one of these.
_LEADING = re.compile(
    r"\S+\s+\S|(?:indeed|simply|just|precisely|clearly|thus|therefore|then|still|only)\s", re.IGNORECASE
)
# What may not be left out after a formula.
_CHANGING = re.compile(
    rf"\s*(?:[,;\uff0c\uff1b]\s*\w|[%!^/*+=<>-]|{_SCALE}"
    r"|(?:percent|plus|minus|times|divided|over|and|or|to|[a-zA-Z])(?![a-zA-Z]))",
    re.IGNORECASE,
)
_BOUND = (
    r"(?:\b(?:not|never|cannot|neither|nor|either|less|more|fewer|greater|larger|smaller|bigger|most|least|than|under|"
    r"over|above|below|between|without|maybe|perhaps|possibly|probably|wrong|incorrect)\b|n['\u2019]t\b)"
)
# Before a value: what makes another value of it, or several.
_CHANGED_BEFORE = re.compile(
    _BOUND + r"|\b(?:minus|twice|half|double|triple|square|cube|root|sqrt|log|ln|exp|sin|cos|tan|pi)\b"
    r"|[<>\u2264\u2265\u2260+*/^\\(\[{|]|(?<![a-zA-Z])-",
    re.IGNORECASE,
)
_BOUND_AFTER = re.compile(_BOUND, re.IGNORECASE)
_BOUND_BEFORE = re.compile(
    r"(?:\b(?:not|cannot|never|(?:less|more|fewer|greater|larger|smaller|rather)\s+than|at\s+(?:most|least))"
    r"|n['\u2019]t)(?:\s+be)?(?:\s+equal)?(?:\s+to)?[\s$*\\(\[]*\Z|[\d$]\s*\bor\s*\Z"
    rf"|{east_asian.BOUND_BEFORE}",
    re.IGNORECASE,
)


def in_prose(text: str) -> str | None:
    """The answer of a text without a box; None if it gives none."""
    text = _without_emphasis(text)
    after = _behind_cue(text)
    if after is not None:
        sentence, rest = _sentence(after)
        answer = _value(sentence)
        return None if _second_thought(rest) and _last_value(rest) != answer else answer
    last = text.strip().rpartition("\n")[2].strip()
    if len(last) <= 500 and "\\" in last and "$" not in last and _BARE_LINE.fullmatch(last):
        return last
    return _last_value(text)


def stated(text: str) -> str | None:
    """The answer of a text that is all answer, such as the content of `<answer>`: of one sentence, else all of it."""
    plain = _without_emphasis(text)
    after = _behind_cue(plain)
    content = plain if after is None else after
    _, rest = _sentence(content)
    if _second_thought(rest):
        return None
    return text if _bare(rest) else _value(content)


def _without_emphasis(text: str) -> str:
    return _EMPHASIS.sub(r"\2\4", text) if any(mark in text for mark in "*`_~<") else text


def _second_thought(rest: str) -> bool:
    return second_thought(rest) or east_asian.second_thought(rest)


def _behind_cue(text: str) -> str | None:
    """What follows the last cue; None without one, or if nothing follows it."""
    cue = next(reversed(list(_CUES[text.isascii()].finditer(text))), None)
    after = text[cue.end() :].lstrip(_BEFORE) if cue else ""
    return after if after.strip(_AFTER + "$") else None


def _sentence(text: str) -> tuple[str, str]:
    """The first sentence, with a displayed formula that it announces, and the text behind it."""
    text = text.lstrip(_BEFORE)
    formulas = _formulas(text)
    place = 0
    for mark in _SENTENCE_END.finditer(text):
        while place < len(formulas) and formulas[place].closed <= mark.start():
            place += 1
        following = formulas[place] if place < len(formulas) else None
        if following and following.opened < mark.end():
            continue  # the mark is inside this formula
        end = mark.end() if mark.group(0) in "?\uff1f" else mark.start()  # a question states nothing: its mark stays
        if following and not text[end : following.opened].strip() and _ANNOUNCED.search(text, max(0, end - 12), end):
            end = following.closed
        return text[:end], text[max(end, mark.end()) :]
    return text, ""


def _value(sentence: str, *, subject: bool = True) -> str | None:
    """The first value of a sentence, with those that are joined to it; the words of one that has no value.

    None if it is taken back. `subject`: a formula that the sentence is about may stand before it.
    """
    sentence = _bare(sentence)
    if east_asian.LETTER.search(sentence):
        return _east_asian(sentence)
    formulas = _formulas(sentence)
    mask = masked(sentence, formulas)
    first, second = [*itertools.islice(_NUMBER.finditer(mask), 2), None, None][:2]
    end = end_of_value(sentence, mask)
    if first is None or not sentence[0].isalpha():
        return None if end is None else _joined(_bare(sentence[:end]))
    # The sentence begins with words, or a name.
    before = sentence[: first.start()]
    formula = bool(formulas) and formulas[0].opened == first.start()
    if subject and formula and not _ANNOUNCED.search(before):
        # "Answer: The largest $n$ is 34": the formula before the verb is what the answer is about.
        verb = _IS.search(mask, formulas[0].closed)
        if verb and _bare(sentence[verb.end() :]):
            return _value(sentence[verb.end() :], subject=False)
    if end is None:
        return None
    alone = formula or second is None or second.start() >= end
    if alone and first.start() < end and not _CHANGED_BEFORE.search(before) and (formula or _LEADING.match(before)):
        return _joined(_bare(sentence[first.start() : end]))
    return _bare(sentence[:end])


def _joined(text: str) -> str:
    """The contents of the formulas that `text` begins with, joined; all of it where more than plain words is left."""
    formulas = _formulas(text)
    if not formulas or formulas[0].opened:
        return text
    found = [formulas[0]]
    for formula in formulas[1:]:
        if not JOIN.fullmatch(text, found[-1].end, formula.start):
            break
        found.append(formula)
    rest = masked(text, formulas)[found[-1].closed :]
    if any(char.isdigit() for char in rest) or _CHANGING.match(rest) or _BOUND_AFTER.search(rest):
        return text
    return ", ".join(text[formula.start : formula.end] for formula in found)


def _east_asian(sentence: str) -> str | None:
    value = east_asian.value(sentence)
    if value == "":  # it begins with words
        numbers = list(itertools.islice(_NUMBER.finditer(masked(sentence, _formulas(sentence))), 2))
        if len(numbers) != 1 or _BOUND_BEFORE.search(sentence, 0, numbers[0].start()):
            return sentence
        value = east_asian.value(sentence[numbers[0].start() :])
    return value if value is None or east_asian.LETTER.search(value) else _value(value)


def _last_value(text: str) -> str | None:
    """The last formula or number, unless it is denied; with the word that makes another number of it."""
    formulas, numbers = _formulas(text), list(_NUMBER.finditer(text))
    if formulas and not (numbers and numbers[-1].start() > formulas[-1].end):
        opened, start, end, closed = formulas[-1]
    elif numbers:
        start, end = opened, closed = _unit_of(text, *numbers[-1].span())
    else:
        return None
    if _BOUND_BEFORE.search(text, max(0, opened - 40), opened):
        return None
    if denied(text, closed) or east_asian.denied(text, closed):
        return None
    scale = _SCALED.match(text, closed) or east_asian.CHANGED.match(text, closed)
    return text[start:end] + text[closed : scale.end()] if scale else text[start:end]


def _unit_of(text: str, start: int, end: int) -> tuple[int, int]:
    """The place of a number, or of the formula without marks that it is a part of: "\\frac{4}{3}", "42x", "x+3"."""
    if _ALONE_BEFORE.search(text, max(0, start - 1), start) and not _GOES_ON.match(text, end):
        return start, end
    before, after = _RUN_BEFORE.search(text, max(0, start - 200), start), _RUN_AFTER.match(text, end)
    return before.start() if before else start, after.end() if after else end


def _bare(text: str) -> str:
    """Without the punctuation and the pictures about it."""
    while True:
        text = text.lstrip(_BEFORE).rstrip(_AFTER)
        ends = [char for char in (text[:1], text[-1:]) if char and not char.isascii() and _is_picture(char)]
        if not ends:
            return text
        text = text.strip("".join(ends))


def _is_picture(char: str) -> bool:
    """A check mark, an emoji or what varies one; not a degree sign, and no letter in a circle."""
    picture = unicodedata.category(char) == "So" and not unicodedata.decomposition(char) and char != "\u00b0"
    return picture or char in "\ufe0f\u200d"


class _Formula(NamedTuple):
    """Places of a closed formula: its opening mark, its content from `start` to `end`, and where its marks end."""

    opened: int
    start: int
    end: int
    closed: int


def _formulas(text: str) -> list[_Formula]:
    """Every closed formula, in order. The dollar of a price opens none: "$18 ($9 each)"."""
    found: list[_Formula] = []
    opening: re.Match[str] | None = None
    for mark in _FORMULA.finditer(text):
        if opening is None:
            opening = mark if mark.group(0) in _CLOSERS else None
        elif mark.group(0) == _CLOSERS[opening.group(0)]:
            if mark.group(0) == "$" and _PRICE.match(text, opening.end()) and _NEXT_PRICE.match(text, mark.start() - 1):
                opening = mark
                continue
            if text[opening.end() : mark.start()].strip():
                found.append(_Formula(opening.start(), opening.end(), mark.start(), mark.end()))
            opening = None
        elif mark.group(0) in ("\\(", "\\["):
            opening = mark
    return found
