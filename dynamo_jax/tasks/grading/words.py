"""The words of a normalised answer: answers that are words, units, labels before and remarks after a value."""

# ruff: noqa: SIM905 - a line of words reads better than a list

from __future__ import annotations

import re

from dynamo_jax.tasks.grading.exact import NotRationalError, evaluate
from dynamo_jax.tasks.grading.latex import GREEK, key
from dynamo_jax.tasks.grading.numerals import NUMBER_WORDS, PART_WORDS, PLURAL_PARTS, SCALE_WORDS

_LEADING = set(
    "the final answer answers is are thus so hence therefore value of equals equal to approximately approx about "
    "around roughly nearly exactly both either we have get there total result solution solutions option choice "
    "答案是 答案为 答案 是 为 约".split()
)
_ARTICLES = re.compile(r"\b(?:the|an|a)\s+")
_SYNONYMS = dict.fromkeys(
    ("no solutions", "no real solution", "no real solutions", "there are no solutions", "there is no solution"),
    "no solution",
) | {"dne": "does not exist"}
_QUOTED = re.compile(r'"([^"]*)"')
_JOINING = re.compile(r'"?\s*(?<![A-Za-z\\])(?:,\s*)?(?:and|or|and/or)(?![A-Za-z])\s*"?')
_LEADING_WORDS = re.compile(r'("?)\s*([^\W\d_]++(?:[\s,]+[^\W\d_]++)*)\s*[:,]?\s*+("?+)\s*+(?![\^_(=])')
_IS = r"(?:(?:is|are)(?:\sequal\sto)?|equals?)"
_NAMING = re.compile(
    r'"\s?([A-Za-z][^"]*?(?:"[^"=<>\d]{1,20}"[^"]*?){0,3})\s?(?:(?::|(?<=[\s"])'
    rf'{_IS})\s?"|"\s?:)(?=\s*[^\s="])',
    re.IGNORECASE,
)
_SYMBOL_IS = re.compile(rf'([A-Za-z])\s?"\s?{_IS}\s?"', re.IGNORECASE)
_CHOICE = re.compile(r'"?(?:(?i:option|choice|answer)\b\s*:?\s*"?)?\s*\(?\s*([A-Z\u2460-\u2473])\s*\)?\s*[.:]?\s*"?')
_LABELLED_CHOICE = re.compile(r"(?:\(\s*([A-H])\s*\)|([A-H])\s*[.:)])\s")
_UNIT = (
    r"(?:km|cm|mm|nm|dm|kg|mg|sec|secs|min|mins|hr|hrs|hours?|minutes?|seconds?|days?|weeks?|months?|years?|miles?|mi|mph|"
    r"feet|foot|ft|inch|inches|in|yards?|yd|meters?|metres?|kilometers?|centimeters?|cents?|dollars?|degrees?|deg|rad|"
    r"radians?|units?|square|sq|cubic|per|liters?|litres?|ml|mL|kJ|kPa|kW|MeV|keV|eV|Hz|kHz|MHz|Pa|mol|mph|rpm|psi|erg|ergs|"
    r"km/h|USD|EUR|dB|\\Omega|ohms?|amu|AU|pc|Mpc|kpc|nC|mC|[mgsNJWKVACLTF])"
)
_UNITS = re.compile(rf"(?P<value>.*[\d}})!])\s*(?P<units>{_UNIT}(?:[\s/\\cdot]*(?:\^\s*\{{?-?\d\}}?)?\s*{_UNIT})*\s*"
                    r"(?:\^\s*\{?-?\d\}?|\b(?:squared|cubed))?)", re.DOTALL)  # fmt: skip
_WRONG = (
    r"(?:wrong|incorrect|false|invalid|impossible|untrue|bad|inaccurate|mistaken|erroneous|extraneous|excluded|rejected"
    r"|undefined|unverified|uncertain|doubtful|guess)"
)
# Words after a value that bound it, make another value of it, deny or doubt it, wherever they stand ...
CHANGING_WORDS = (
    r"most|least|more|less|fewer|greater|above|below|over|under|upwards?|onwards?|up\s+to|than|or|not|nope|none|nothing"
    r"|never|nor|neither|cannot|\w+n['\u2019]t|except|unless|maybe|perhaps|possibly|probably|unsure|doubt"
    r"|fail(?:s|ed)\s+(?:the|to)|I\s+(?:think|guess|suppose)|plus|minus|divided|multiplied|added\s+to|subtracted|itself"
    rf"|factorial|mod|modulo|out\s+of\s+one|one[\s-](?:{PART_WORDS})|{SCALE_WORDS}|[a-z]+illions?|millionen|millones"
    r"|milliard(?:s|en)?|googol|myriads?"
)
# ... those that do so only right after it: `5 "root two"`, but `5 "real roots"` ...
_FIRST_WORDS = (
    r"(?:whole\s+|all\s+)?(?:squared|cubed)|(?:(?:square|cube)\s+)?root|sqrt|exp|choose|point\s+one|power|exponent|no"
    r"|wait|oops|sorry|hmm+|one|\\?pi|add(?:ed|ing)?|subtract(?:ing)?|multiply(?:ing)?|divid(?:e|ing)|[a-z]+fold"
    r"|(?:raised|increased|decreased|reduced|lowered|taken)\s+(?:to|by|from)"
    r"|to\s+(?:the(?!\s+nearest)|[b-z]|\\infty|power|one(?!\s+(?:decimal|significant)))"
    rf"|times(?=\s*\"\s*\S|\s(?:[b-z]\b|\\pi))|(?-i:[binpqrwxyz])|{PLURAL_PARTS}"
)
# ... and those that do so right after it and alone: `5 "square"`, but `5 "square units"`.
_ALONE_WORDS = (
    r"to|gross|score|grand|mill?|mio|tens|square|cube|double|triple|negative|opposite|conjugate|repeating|recurring"
    r"|mega|giga|milli|micro|nano|inverse|inverted|reciprocal|twice|thrice|doubled|tripled|quadrupled|halved|negated"
    rf"|raised|increased|decreased|reduced|{'|'.join(sorted({*GREEK} - {'psi'}))}|{PART_WORDS}|{_WRONG}"
)
_CHANGING = re.compile(
    rf"\b(?:{CHANGING_WORDS}|(?:{NUMBER_WORDS})(?!-)"
    rf"|(?:is|are|was|were|be)\b[^\"]{{0,60}}\b(?:{_WRONG}|mistake|error|too))\b"
    rf"|\(\s*{_WRONG}\b|[\u2717\u2718\u2716\u274c\u4e0d\u9519]",  # crosses; Chinese for "not" and "wrong"
    re.IGNORECASE,
)
_CHANGING_FIRST = re.compile(
    rf'[\s"(:]*(?:(?:{_FIRST_WORDS})(?![a-z-])|(?:{_ALONE_WORDS})(?:[\W_]*$|\s*"|\s+of\b))', re.IGNORECASE
)
# Words in a name that make it the name of another value: `"half of it" is 12`.
_OTHER_VALUE = re.compile(
    rf"\b(?:{CHANGING_WORDS}|{NUMBER_WORDS}|{PART_WORDS}|{_WRONG}|no|twice|thrice|doubled?|tripled?|squared?|cubed?"
    r"|roots?|reciprocal|inverse|negative|opposite|if|when|without)\b",
    re.IGNORECASE,
)
_QUANTIFIER = re.compile(
    r'"?\s?(?:\\forall|(?:for )?(?:all|every|any|each))?\s?(?P<domain>(?:(?:positive|natural|real) )?'
    r'(?:integers?|reals?|numbers?|values)?(?: of)?)\s?"?\s(?=[^"]*$)',
    re.IGNORECASE,
)
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![a-zA-Z])")
_NAMED = re.compile(r'"[^"]*"\s?=')
# "..., k \\in \\mathbb{Z}" after a value that has the letter says what it stands for, and is no second value.
_DOMAIN = re.compile(
    r"(?<=.)(?:,|;)\s*\"?(?:where|for|with)?\"?\s*([a-zA-Z])\s*\\in\s*\\mathbb\s*\{?[ZNQRC]\}?(?:\^[*+])?\s*$"
)
_REMARK = re.compile(r"(?P<value>.*[\d})!])\s+(?P<words>[A-Za-z][A-Za-z']{2,}(?:[\s,]+[A-Za-z']+)*)", re.DOTALL)


def as_words(text: str) -> str | None:
    """The answer in plain lower-case words if it is made of words, else None."""
    if not text or any(c.isdigit() for c in text) or re.search(r"[\\^_{}=<>+*/|\[\]]", text):
        return None
    plain = text.replace('"', " ")
    words = re.findall(r"[^\W\d_]+", plain)
    longest = max(map(len, words), default=0)
    # Two letters may be a product, all but "no".
    if longest < 2 or not ('"' in text or longest >= 3 or plain.casefold() == "no") or "," in plain:
        return None
    joined = _ARTICLES.sub("", " ".join(plain.split()).strip(" .!()").casefold() + " ").strip()
    return _SYNONYMS.get(joined, joined) or None


def choice(text: str) -> str | None:
    """The letter or circled digit of a multiple-choice answer: `B`, `(B)`, `B.`, `(B) 12`, `②`."""
    match = _CHOICE.fullmatch(text)
    if match:
        return match.group(1)
    match = _LABELLED_CHOICE.match(text)
    return match.group(1) or match.group(2) if match else None


def without_label(text: str) -> str:
    """`(B) 12` without its letter."""
    match = _LABELLED_CHOICE.match(text)
    return text[match.end() :].strip() if match else text


def without_words(text: str) -> str:
    """Without words that do not change the value: units and remarks after it, "the answer is" before it.

    "and", "or" and commas inside text separate the members of a list. Words that could change the meaning ("less
    than", or anything followed by another number) stay, and the answer then equals no number.
    """
    text = _without_leading_words(_without_naming(text))
    domain = _DOMAIN.search(text)
    text = text[: domain.start()].strip() if domain and domain.group(1) in text[: domain.start()] else text
    text = _QUOTED.sub(lambda m: "," if "," in m.group(1) else m.group(0), text)
    text = _JOINING.sub(" , ", text).strip(" ,") if _JOINING.search(text) and re.search(r"[\d\\=]", text) else text
    text = re.sub(r",(?:\s*,)+", ",", text)
    text = text.removeprefix("\\approx").strip()
    if "\\approx" in text:
        left, _, right = text.partition("\\approx")
        if re.fullmatch(r"\s*[A-Za-z]\s*", left):
            text = right.strip()
        elif _plausible(left, right):
            text = left.strip()
    return _without_leading_words(text)


def _without_leading_words(text: str) -> str:
    leading = _LEADING_WORDS.match(text)
    if leading and leading.end() < len(text) and set(leading.group(2).lower().replace(",", " ").split()) <= _LEADING:
        inside = leading.group(1) != leading.group(3)  # of quotes, which the rest then needs anew
        text = ('"' if inside else "") + text[leading.end() :].strip()
    return text


def _without_naming(text: str) -> str:
    """`"Area:" 12` without the name, `x "is" 12` as `x = 12`; not the name of another value (`"half of it is" 12`)."""
    if '"' not in text:
        return text
    text = _SYMBOL_IS.sub(r"\1 =", text, count=1) if _SYMBOL_IS.match(text) else text
    named = _NAMING.match(text)
    return text[named.end() :].strip() if named and not _OTHER_VALUE.search(named.group(1)) else text


def without_quantifier(gold: str, answer: str) -> tuple[str, str]:
    """`"all integers" k \\ge 2` as `k \\ge 2`, in both; not where one is about whole numbers, one is not.

    An inequality alone may be about either; an interval is about real numbers.
    """
    (gold_domain, plain_gold), (answer_domain, plain_answer) = _quantified(gold), _quantified(answer)
    domains = {gold_domain, answer_domain}
    related = _RELATION.search(plain_gold) and _RELATION.search(plain_answer)
    if len(domains) == 1 or ("" in domains and ("real" in domains or related)):
        return plain_gold, plain_answer
    return gold, answer


def _quantified(text: str) -> tuple[str, str]:
    """What kind of numbers a text says that it is about, "" if it doesn't, and the inequality alone."""
    quantifier = _QUANTIFIER.match(text)
    rest = text[quantifier.end() :] if quantifier else ""
    if quantifier is None or not quantifier.group(0).strip(' "') or not _RELATION.search(rest):
        return "", text
    domain = quantifier["domain"].lower()
    return " ".join(kind for kind in ("positive", "natural", "real", "integer") if kind in domain), rest


def _plausible(value: str, rounded: str) -> bool:
    """Not 42 \\approx 43: two numbers within a hundredth of each other, or no numbers at all."""
    try:
        exact, near = evaluate(value), evaluate(rounded)
    except NotRationalError:
        return True
    return abs(exact - near) * 100 <= abs(exact)


def without_remark(text: str) -> str:
    """One value without the text that follows it: a unit, "for all x", "miles from A"."""
    text = re.sub(r'"\s*\^\s*(?:\{[^{}]*\}|\w)', '"', text)  # the power of a unit
    start = text.find('"')
    if start == 0:  # a name in words before `=`
        named = _NAMED.match(text)
        start = text.find('"', named.end()) if named else 0
    head, tail = text[:start].rstrip(" /"), text[start:]
    if start <= 0 or changes(tail) or any(c.isdigit() for c in tail) or not head or head.endswith(("=", "\\cdot")):
        return text.removeprefix('"').removesuffix('"') if key(text).count('"') == 2 and " " not in text else text
    return head


def without_units(text: str, words_only: bool = False) -> str:
    """A number without the bare units or words that follow it: `3 m/s`, `12 ways`; `words_only`: not without the m."""
    match = (None if words_only else _UNITS.fullmatch(text)) or _REMARK.fullmatch(text)
    return match["value"].strip() if match and not changes(text[match.end("value") :]) else text


def changes(words: str) -> bool:
    """Do the words after a value make another value of it, bound, deny or doubt it?"""
    return _CHANGING.search(words) is not None or _CHANGING_FIRST.match(words) is not None
