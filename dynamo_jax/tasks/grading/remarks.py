"""Where a value ends in a sentence, and whether the sentence takes it back.

What follows a value and gives a reason or a remark is no part of it: "42 because 6 * 7 = 42", "42, which is even",
"42 (since 40 + 2 = 42)", "42 - the sum of both". Only known words open a remark; all else stays with the value and is
compared. A value that is denied, doubted, corrected or tied to a condition among several is none: "42, no, 43",
"42 is wrong", "42 if n is odd, 43 otherwise". Linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate

_NUMBER_WORD = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty|"
    r"seventy|eighty|ninety|hundred)(?![a-zA-Z])"
)
# A word of prose, and not the name of a function, a letter or a number, nor a label before a sign.
_WORD = (
    rf"(?!{_NUMBER_WORD}|(?:and|or|nor|sin|cos|tan|cot|sec|csc|arc\w+|log|exp|sqrt|max|min|gcd|lcm|inf\w*|alpha|beta|"
    r"gamma|delta|theta|lambda|sigma|omega|phi|undefined|none)(?![a-zA-Z]))"
    r"(?:[A-Za-z][a-z]{2,}+|(?:it|we|in|by|he|on|an)(?![a-zA-Z]))(?!\s*[=^_<>]|\()"
)
_REASON = (
    r"(?:[Bb]ecause|[Ss]ince|as(?!\s+(?:well|low|high|small|large|much|many|few|opposed)\b)|so|where|which|whose|when|"
    r"whenever|if|for|that|i\.?\s?e|e\.g|given|hence|thus|therefore|while|meaning|namely|making|obtained|assuming|due|"
    r"owing|rounded|at(?!\s+(?:most|least)\b)|in\s+(?:total|all)|after(?!\s+round)|and\s+(?:this|that|it|we)|"
    r"with(?!\s+(?:(?:a|an)\s+)?(?:remainder|error)|\s+\d)|or\s+equivalently|"
    r"to\s+(?:the\s+nearest|\w+\s+(?:decimal|significant))|"
    rf"(?:by|from|using|thanks)(?=\s+(?!{_NUMBER_WORD})[A-Za-z]{{3,}})|[\u2234\u2235])(?![a-zA-Z]|\s*[=^_(])"
)
_WRONG = r"(?:wrong|incorrect|false|mistaken|untrue|invalid|impossible|an?\s+(?:mistake|error))(?![a-zA-Z])"
_NOT = r"(?:not|never|(?<=n)['\u2019]t)(?![a-zA-Z])"
_NO = r"no(?=\s*(?:[.,;:!?)\d$\u2013\u2014-]|\Z))"
_DENIAL = (
    rf"(?:(?:not|{_NO}|nope|wait|but|rather|instead|either|neither|maybe|perhaps|possibly|though|although|however|"
    r"unless|actually|except|otherwise|sorry|oops|hmm+|cannot|can\s+not|can['\u2019]t|"
    r"(?:is|was|are|does|could|would)n['\u2019]t|or\s+(?:so|not|maybe|perhaps|less|more|rather|is))(?![a-zA-Z])"
    rf"|{_WRONG}|(?:is|was|are|seems|looks|must\s+be|does|would\s+be)\s+(?:\w+ly\s+)?(?:{_NOT}|{_WRONG}))"
)
_BETWEEN = r"\s,;:\uff0c\uff1b\u2013\u2014-"  # punctuation between a value and a remark
_TAIL = re.compile(
    rf"(?<![.{_BETWEEN}])[.{_BETWEEN}]++(?:(?=(?i:{_DENIAL}))|(?={_REASON}))|[,;:\uff0c\uff1b]\s*+(?={_WORD})"
    rf"|(?<!\s)\s+(?:-{{1,3}}|[\u2013\u2014])\s*+(?={_WORD})|(?:--+|\u2014)\s*+(?={_WORD})"
)
_DENIED = re.compile(rf"[.(\uff08{_BETWEEN}]*+{_DENIAL}", re.IGNORECASE)
# "42, not 43", "42 rather than 43": another value is denied.
_CONTRAST = re.compile(
    rf"[(\uff08{_BETWEEN}]*+(?:and\s+)?(?:not|rather\s+than|instead\s+of)\s+(?=[-+]?[\d$\\.(]|[A-Ja-z](?![a-zA-Z]))",
    re.IGNORECASE,
)
_ANY_DENIAL = re.compile(rf"(?<![a-zA-Z]){_DENIAL}", re.IGNORECASE)
_DENIED_NEXT = re.compile(rf"[^\w\n.!?]*+{_DENIAL}", re.IGNORECASE)
_THAT = r"\b(?:that|this|it|which)"
_CORRECTION = (
    r"(?:\b(?:wait|oops|scratch\s+that|correction|i\s+mean|make\s+that|nope|hmm+|not\s+sure|"
    rf"no(?=\s*[,.;:!\u2013\u2014-]))(?![a-zA-Z])|{_THAT}(?:['\u2019]s|\s+(?:is|was|seems|must\s+be))\s+(?:\w+ly\s+)?"
    rf"(?:not\s+(?:right|correct|true|it|the)\b|{_WRONG})"
    rf"|{_THAT}\s+can(?:not|\s+not|['\u2019]t)\s+be(?:\s+(?:right|correct|true|it))?\s*(?:[.,;!]|\Z)"
    r"|\bshould\s+(?:be|have\s+been)\s\W{0,20}\d)"
)
_CORRECTED = re.compile(_CORRECTION, re.IGNORECASE)
_SECOND_THOUGHT = re.compile(rf"\W*(?:but\s+|oh\W+)?(?:(?:actually|sorry)\b|{_CORRECTION})", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z-]+(?: [A-Za-z-]+){0,2}?(?=,?\s+(?:because|since)\b|,\s+(?:which|so|as|i\.e)\b)")
_CONDITION = re.compile(rf"[{_BETWEEN}]*+(if|when|whenever|for|where|at)(?![a-zA-Z])")
_ANOTHER = re.compile(r"[,;]|\b(?:and|or|but|while)\b")
_VALUE = re.compile(
    r"\d|\\[a-zA-Z]|[\u00b2\u00b3\u00b9\u00bc-\u00be\u221a\u03c0\u221e]"
    r"|\A[a-zA-Z](?=\s*[0,.;:=+*/^_-]|\s+(?:because|since|as|which)\b)"
)
_OPEN_END = re.compile(r"(?:\b(?:and|or|not|than|to)|[-+*/=^(\[])\s*$", re.IGNORECASE)
_BRACKET = re.compile(r"\\[()\[\]{}]|\\[a-zA-Z]+|[()\[\]{}\uff08\uff09]")
_OPENING = "([{\uff08"
_ORIGIN = re.compile(rf"{_REASON}|(?:from|by|using|see|mod|verified|checked|correct|exact|exactly)\b")
_ARITHMETIC = re.compile(r"[\d.\s()+*/-]*[\d)]\s*[-+*/][\d.\s()+*/-]*")
# "42 (43 if n is odd)", "42 (or 43)"
_CASE = re.compile(r"[\s$]*(?:-?\d[^;]*?\b(?:if|when|otherwise|else)\b|or\b(?!\s+equivalently))")
_TIMES = re.compile(r"\\(?:times|cdot)(?![a-zA-Z])|(?<=[\d\s])(?:x|times)(?=[\s\d$])")
_MARKS = ("$", "\\)", "\\]")
_PLAIN = str.maketrans(
    {"\u00d7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-"} | dict.fromkeys("$\u00a3\u20ac\u00a5,\\")
)


def masked(text: str, spans: Sequence[tuple[int, ...]]) -> str:
    """`text` with all from the first to the last place of each span replaced by as many digits 0: a value, no words."""
    parts, end = [], 0
    for opened, *_, closed in spans:
        parts += [text[end:opened], "0" * (closed - opened)]
        end = closed
    return "".join((*parts, text[end:]))


def end_of_value(text: str, mask: str) -> int | None:
    """Where the first value of `text` ends: at a remark, or at the end. None if what follows takes it back.

    `mask` is what `masked` gives for `text` and its formulas. Words that are an answer end at a reason, too.
    """
    brackets = _brackets(mask)
    mask = masked(mask, brackets)
    value = _VALUE.search(mask)
    words = _WORDS.match(mask)
    if words and (value is None or value.start() >= words.end()):
        return words.end()
    if value is None:
        return len(text)
    ends = [tail.start() for tail in _TAIL.finditer(mask, value.end()) if not _open_ended(mask, tail.start())][:1]
    for start, end in brackets:
        apart = mask[start - 1].isspace() or text[start] == "\uff08"
        if start >= value.end() and apart and not _open_ended(mask, start):
            ends += [start] * _is_remark(text[start + 1 : end - 1], text[:start].rstrip())
            break
    if not ends:
        return len(text)
    return None if _taken_back(text, min(ends)) else min(ends)


def denied(text: str, place: int) -> bool:
    """Is the value that ends at `place` denied by what follows it in its sentence?"""
    return _DENIED_NEXT.match(text, place) is not None


def second_thought(text: str) -> bool:
    """Does `text`, which follows the sentence of an answer, begin by taking the answer back: "Wait, ...", "No, ..."?"""
    return _SECOND_THOUGHT.match(text) is not None


def _taken_back(text: str, end: int) -> bool:
    contrast = _CONTRAST.match(text, end)
    if contrast:
        value, other = (re.sub(r"[\s$*()]", "", part) for part in (text[:end], text[contrast.end() :]))
        itself = other.startswith(value) and not re.match(r"[\w.,]*\d", other[len(value) :])
        return itself or _ANY_DENIAL.search(text, contrast.end()) is not None
    if _DENIED.match(text, end) or _CORRECTED.search(text, end):
        return True
    condition = _CONDITION.match(text, end)
    if condition is None:
        return False
    again = re.search(rf"\b(?:{condition[1]}|otherwise|else)\b", text[condition.end() :])
    return again is not None and _ANOTHER.search(text, condition.end()) is not None


def _open_ended(text: str, end: int) -> bool:
    """Does the text before `end` still wait for something: "42 or so", "2 (x + 1)" after a sign?"""
    return _OPEN_END.search(text, max(0, end - 12), end) is not None


def _brackets(text: str) -> list[tuple[int, int]]:
    """Start and end of every outermost pair of brackets, of whatever kinds: an interval has two."""
    spans: list[tuple[int, int]] = []
    depth = start = 0
    for match in _BRACKET.finditer(text):
        mark = match.group(0)[-1]
        if mark in _OPENING:
            start = start if depth else match.start()
            depth += 1
        elif not mark.isalpha() and depth:
            depth -= 1
            if depth == 0:
                spans.append((start, match.end()))
    return spans


def _is_remark(inside: str, value: str) -> bool:
    """Is what stands in brackets after a value said about it, and no factor: words, a statement, how it comes about?

    After a formula with its marks it is no factor either, unless it is one number.
    """
    if _CASE.match(inside):
        return False
    if _CONTRAST.match(inside):
        return True
    words = [word for word in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z]+", inside) if len(word) > 1]
    if len(words) > 1 or "=" in inside or (words and _ORIGIN.match(inside.strip())):
        return True
    if value.endswith(_MARKS) and not re.fullmatch(r"[\s$\d.,]*", inside):
        return True
    return len(inside) <= 200 and _comes_to(inside, value)


def _comes_to(calculation: str, value: str) -> bool:
    """Is `calculation`, of at least two plain numbers and perhaps of money, equal to `value`?"""
    texts = (_TIMES.sub("*", text.replace("{,}", "")).translate(_PLAIN).strip() for text in (calculation, value))
    calculation, value = texts
    if not _ARITHMETIC.fullmatch(calculation):
        return False
    try:
        return evaluate(calculation.replace("*", "\\cdot ")) == evaluate(value.split(" ")[0])
    except NotRationalError:
        return False
