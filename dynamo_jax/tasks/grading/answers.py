"""Is an answer right? Decided without symbolic algebra wherever that is possible.

`compare` takes the two answers apart - lists, sets, tuples, intervals, matrices, equations - down to single
expressions, and compares those: exactly where both are rational numbers, as words where they are words, else through
the `Algebra` that the caller passes. Without one, what only algebra can tell is None, undecided.
Pure functions, no side effects, bounded work whatever the text; no text is ever evaluated as code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Protocol

from dynamo_jax.tasks.grading.asked import names_quantity
from dynamo_jax.tasks.grading.exact import NotRationalError, TooLargeError, evaluate
from dynamo_jax.tasks.grading.extract import extract
from dynamo_jax.tasks.grading.latex import in_radians, key, normalise
from dynamo_jax.tasks.grading.matrices import determinant, matrix
from dynamo_jax.tasks.grading.structure import (
    COORDINATES,
    Bracketed,
    bracketed,
    is_name,
    is_solution,
    labelled_tuple,
    members,
    ratio,
    same_argument,
    split,
    variables,
    without_systems,
)
from dynamo_jax.tasks.grading.words import (
    as_words,
    choice,
    without_label,
    without_quantifier,
    without_units,
    without_words,
)

MAX_CHARS = 4000  # of a normalised answer, beyond twice the gold's
MAX_MEMBERS = 200  # of a list that is compared member by member
_UNEVALUATED = re.compile(r"\\(?:sum|prod|i*int|oint|lim|limsup|liminf)(?![a-zA-Z])")
_OPEN_ENDED = re.compile(r"\\ldots|\\begin\{(?:cases|aligned?|gathered)|\?|\.\.\.")
_RELATION = re.compile(r"[<>=]|\\(?:le|ge|ne|approx|equiv|cong|sim|in|to|Rightarrow|Leftrightarrow)(?![a-zA-Z])")
_BEYOND_RATIONAL = re.compile(r"\\[a-zA-Z]|[a-zA-Z|]")
_EMPTY = {"\\emptyset", "\\{\\}", "\\{ \\}"}


class Algebra(Protocol):
    """What the exact path cannot do. Both may raise; both must be right when they return True."""

    def equal(self, gold: str, answer: str) -> bool: ...

    def same_equation(self, gold: tuple[str, str], answer: tuple[str, str]) -> bool: ...

    def has_value(self, text: str) -> bool: ...


def judge(output: str, gold: str) -> bool | None:
    """Is the response `output` right? None where only algebra can tell (see `compare`)."""
    answer = extract(output)
    return False if answer is None else compare(gold, answer)


def check_gold(gold: str) -> str | None:
    """Why `gold` cannot be used as a reference answer; None if it can."""
    if not gold.strip():
        return "the reference answer is empty"
    text = _gold_text(gold)
    if not text.strip(' "{}'):
        return f"nothing is left of the reference answer {gold[:80]!r} once its formatting is removed"
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            break
    return f"the braces of the reference answer {gold[:80]!r} do not match" if depth else None


def readable(gold: str, algebra: Algebra | None = None) -> bool:
    """Can an answer in another spelling equal `gold`? Without `algebra`, False also where only a parser can tell.

    Words, choices and the values that the exact path reads can; everything else the algebra must be able to read. What
    its parser raises comes through: the worker around it answers with the error, which is no value either.
    """
    text = _gold_text(gold)
    if as_words(text) is not None or choice(text) is not None or text in _EMPTY:
        return True
    try:
        plain = without_words(text)
        parts = members(without_quantifier(plain, plain)[0], thousands=True)
        return len(parts) <= MAX_MEMBERS and all(_readable(part, algebra, 0) for part in parts)
    except (ValueError, RecursionError):
        return False


def _readable(text: str, algebra: Algebra | None, depth: int) -> bool:
    if depth > 8:
        return False
    for read in (matrix, bracketed):
        inner = read(text)
        if inner is not None:
            return all(_readable(item, algebra, depth + 1) for item in inner.items)
    sides = split(text, "=")
    if len(sides) > 1:
        return all(is_name(side) or _readable(side, algebra, depth + 1) for side in sides if side)
    terms = ratio(text)
    if terms is not None:
        return all(is_name(term) or _readable(term, algebra, depth + 1) for term in terms)
    text = text.rstrip("% ")
    if _Comparison.number(text) is not None or _Comparison.number(without_units(text)) is not None:
        return True
    if text.lstrip("+- ") == "\\infty" or as_words(text) is not None:
        return True
    return algebra is not None and algebra.has_value(text)


def compare(gold: str, answer: str, algebra: Algebra | None = None) -> bool | None:
    """Is `answer` (already extracted) the same as `gold`? None: undecided, and then only without `algebra`."""
    gold, answer = in_one_unit(gold, " ".join(answer.split()))
    gold_text = _gold_text(gold)
    if len(answer) > 4 * MAX_CHARS + 4 * len(gold_text):
        return False
    text = without_systems(normalise(answer))
    if not text or not gold_text:
        return False
    if key(text) == key(gold_text):
        return True
    if len(text) > MAX_CHARS + 2 * len(gold_text):
        return False
    if _UNEVALUATED.search(text) and not _UNEVALUATED.search(gold_text):
        return False
    if _OPEN_ENDED.search(text) and not _OPEN_ENDED.search(gold_text):
        return False
    return _Comparison(algebra).whole(gold_text, text)


def in_one_unit(gold: str, answer: str) -> tuple[str, str]:
    """Both texts; an angle in degrees is turned into radians if the other one is a multiple of pi."""
    with_pi = ["\\pi" in text or "π" in text for text in (gold, answer)]
    if not any(with_pi) or len(answer) > MAX_CHARS:
        return gold, answer
    return in_radians(gold, always=with_pi[1]), in_radians(answer, always=with_pi[0])


def cache_key(gold: str, answer: str) -> tuple[str, str]:
    """Equal for two answers only if they get the same verdict."""
    return gold, normalise(in_one_unit(gold, answer)[1])


def _gold_text(gold: str) -> str:
    return without_systems(normalise((extract(gold) if "\\boxed" in gold else None) or gold))


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """True if all are, False as soon as one is, else undecided."""
    undecided = False
    for verdict in verdicts:
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


class _Comparison:
    def __init__(self, algebra: Algebra | None) -> None:
        self.algebra = algebra

    def whole(self, gold: str, answer: str) -> bool | None:
        words = as_words(gold)
        if {gold, answer} & _EMPTY and "no solution" in (words, as_words(answer)):
            return True
        if words is not None:
            return self.words(gold, words, answer)
        letter = choice(gold)
        if letter is not None and choice(answer) is not None:
            return letter == choice(answer)
        answer = without_words(without_label(answer) if letter is None else answer)
        gold, answer = without_quantifier(without_words(gold), answer)
        if not answer:
            return False
        # 1,625 is one number or a list of two; several plus-minus signs go together or not. Both sides must be read
        # the same way in the first, and may be in the second.
        verdicts = []
        for thousands in (False, True) if "," in answer + gold else (False,):
            readings = [
                [members(text, thousands)] + ([members(text, thousands, True)] if text.count("\\pm") > 1 else [])
                for text in (gold, answer)
            ]
            verdicts += [self.unordered(g, a) for g in readings[0] for a in readings[1]]
            if True in verdicts:
                return True
        return None if None in verdicts else False

    def words(self, gold: str, words: str, answer: str) -> bool | None:
        found = as_words(answer)
        if found is None:
            return self.algebraic(gold, answer) if len(words) < 3 and '"' not in gold else False
        if found == words:
            return True
        # Without quotes it may as well be a product: abc and cab.
        product = " " not in words and '"' not in gold + answer and sorted(words) == sorted(found)
        return self.algebraic(gold, answer) if product else False

    def unordered(self, gold: list[str], answer: list[str]) -> bool | None:
        """Multisets: every member of one is matched with exactly one of the other."""
        if len(gold) > MAX_MEMBERS or len(answer) > MAX_MEMBERS:
            return False
        if len(gold) != len(answer):
            # x = 1, y = 2 for the tuple (1, 2), and the other way round
            whole = [side[0] if len(side) == 1 else labelled_tuple(side) for side in (gold, answer)]
            return False if whole[0] is None or whole[1] is None else self.member(whole[0], whole[1])
        left = list(answer)
        undecided = False
        for expected in gold:
            matched = -1
            for index, candidate in enumerate(left):
                verdict = self.member(expected, candidate)
                if verdict:
                    matched = index
                    break
                undecided = undecided or verdict is None
            if matched < 0 and not undecided:
                return False
            if matched >= 0:
                del left[matched]
        return True if not left else None if undecided else False

    def member(self, gold: str, answer: str) -> bool | None:
        """One member of a list: an equation or a single value."""
        if "=" not in gold and "=" not in answer:
            return self.value(gold, answer)
        golds, answers = split(gold, "="), split(answer, "=")
        if len(answers) > MAX_MEMBERS:
            return False
        tuples = labelled_tuple([gold]), labelled_tuple([answer])
        if any(tuples):  # x = y = 1 for the tuple (1, 1)
            whole = tuples[0] or golds[-1], tuples[1] or answers[-1]
            if bracketed(whole[0]) and bracketed(whole[1]):
                return self.value(*whole)
        if len(golds) == 2 and is_name(golds[1]) and not is_name(golds[0]):
            golds.reverse()
        labels = [is_name(link) or (len(golds) == 1 and names_quantity(link, gold)) for link in answers]
        if labels == [False, True]:  # 13 = m+n
            answers.reverse()
            labels.reverse()
        if len(answers) == 1:
            labelled = len(golds) == 1 or is_name(golds[0]) or names_quantity(golds[0], golds[-1], strictly=True)
            return self.value(golds[-1], answers[0]) if labelled else False
        if len(golds) == 1:
            # `x = m+n = 5 \cdot 2 + 3 = 13` is the value 13 only if every link of the chain holds.
            first = next((place for place, label in enumerate(labels[:-1]) if not label), len(labels) - 1)
            return _all(self.value(gold, link) for link in reversed(answers[first:]))
        if len(golds) != 2 or len(answers) != 2:
            return self.chain(golds, answers)
        return self.equation(golds, answers)

    def chain(self, gold: list[str], answer: list[str]) -> bool | None:
        """`x = a+b = 6/2 = 3` and `x = 3`: the same names, and every link that is no label is the value."""
        names, found_names = ({key(side) for side in sides if is_name(side)} for sides in (gold, answer))
        value, last = gold[-1], answer[-1]
        if names and names == found_names and key(value) not in names and key(last) not in names:
            links = [link for link in answer[:-1] if not (is_name(link) or names_quantity(link, value))]
            return _all(self.value(value, link) for link in (last, *links))
        return _all(map(self.value, gold, answer)) if len(gold) == len(answer) else False

    def equation(self, gold: list[str], answer: list[str]) -> bool | None:
        answer = same_argument(gold[0], answer)
        if sorted(map(key, gold)) == sorted(map(key, answer)):
            return True
        if is_name(gold[0]) and is_name(answer[0]):
            same_name = key(gold[0]) == key(answer[0])
            # y = x + 1 and f(x) = x + 1 name the same function
            function = [n == "y" or re.fullmatch(r"[a-zA-Z]\([a-zA-Z]\)", n) for n in (key(gold[0]), key(answer[0]))]
            same_name = same_name or (all(function) and "y" in (key(gold[0]), key(answer[0])))
            coordinates = {gold[0].strip(), answer[0].strip()} <= COORDINATES
            constant = self.number(gold[1]) is not None
            if same_name or (constant and not coordinates):
                return self.value(gold[1], answer[1])
        if is_name(gold[0]) and is_solution(*gold):
            return False  # 2x + 1 = 7 for x = 3 restates the problem
        if self.algebra is None:
            return None
        return self.algebra.same_equation((gold[0], gold[1]), (answer[0], answer[1]))

    def value(self, gold: str, answer: str) -> bool | None:
        if key(gold) == key(answer):
            return True
        if "\\begin" in gold or "\\begin" in answer:
            gold, answer = determinant(gold) or gold, determinant(answer) or answer
        for read in (matrix, bracketed):
            expected, found = read(gold), read(answer)
            if expected is not None and found is not None:
                return self.ordered(expected, found)
            if expected is not None or found is not None:
                return False
        terms, found_terms = ratio(gold), ratio(answer)
        if terms is not None or found_terms is not None:
            return self.proportional(terms or [gold, "1"], found_terms or [answer, "1"])
        return self.leaf(gold, answer)

    def proportional(self, gold: list[str], answer: list[str]) -> bool | None:
        """3:5, 6:10 and 3/5."""
        if len(gold) != len(answer):
            return False
        products = [(f"({g})({answer[0]})", f"({a})({gold[0]})") for g, a in zip(gold, answer, strict=True)]
        return _all(self.leaf(*product) for product in products[1:])

    def ordered(self, gold: Bracketed, answer: Bracketed) -> bool | None:
        if gold.brackets != answer.brackets or len(gold.items) != len(answer.items):
            return False
        return _all(map(self.value, gold.items, answer.items))

    def leaf(self, gold: str, answer: str) -> bool | None:
        """Two single expressions."""
        gold_percent, answer_percent = gold.endswith("%"), answer.endswith("%")
        gold, answer = gold.rstrip("% "), answer.rstrip("% ")
        if _different_base(gold, answer):
            return False
        expected = self.number(gold)
        if expected is None:
            expected = self.number(without_units(gold, words_only=True))
        if expected is not None:
            try:
                found = self.number(answer, strict=True)
                if found is None:
                    found = self.number(without_units(answer), strict=True)
            except TooLargeError:
                return False
            if found is not None:
                return _equal_numbers(expected, gold_percent, found, answer_percent)
        if '"' in gold + answer:
            return as_words(gold) == as_words(answer) is not None
        if "\\infty" in (gold.lstrip("+ "), answer.lstrip("+ ")):
            return gold.lstrip("+ ") == answer.lstrip("+ ")
        letters, others = variables(gold), variables(answer)
        if expected is not None and not _BEYOND_RATIONAL.search(answer):
            return False  # the exact path would have read it
        if _RELATION.search(answer) and not _RELATION.search(gold):
            return False
        if (others and not letters) or (letters and self.number(answer) is not None):
            return False
        if gold_percent != answer_percent:
            return False
        return self.algebraic(gold, answer)

    def algebraic(self, gold: str, answer: str) -> bool | None:
        return None if self.algebra is None else self.algebra.equal(gold, answer)

    @staticmethod
    def number(text: str, strict: bool = False) -> Fraction | None:
        """Its exact value, None if it is not a rational number. `strict`: TooLargeError passes."""
        based = re.fullmatch(r"(-?\d+)\s*_\s*(?:\{\s*(?:\d+|[a-z]+)\s*\}|\d+)", text)
        try:
            return evaluate(based.group(1) if based else text)
        except TooLargeError:
            if strict:
                raise
            return None
        except NotRationalError:
            return None


def _equal_numbers(gold: Fraction, gold_percent: bool, answer: Fraction, answer_percent: bool) -> bool:
    """A percent sign may be added or left out on the same number; otherwise it means a hundredth."""
    if gold == answer:
        return True
    return gold_percent != answer_percent and (gold / 100 if gold_percent else gold) == (
        answer / 100 if answer_percent else answer
    )


def _different_base(gold: str, answer: str) -> bool:
    bases = [re.fullmatch(r"-?[0-9A-F]+\s*_\s*(?:\{\s*(\d+)\s*\}|(\d+))", text) for text in (gold, answer)]
    values = {match.group(1) or match.group(2) for match in bases if match}
    return len(values) > 1


__all__ = ["Algebra", "check_gold", "compare", "extract", "judge"]
