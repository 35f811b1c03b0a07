"""Where in a response the answer stands.

1. Only the text after the last `</think>` counts; a `<think>` that never closes gives no answer.
2. The last `\\boxed`, `\\fbox` or `\\framebox` wins; boxes joined by "and", "or" or a comma form a list. A last box
   that is not closed, or is empty, gives no answer.
3. Without a box: what follows the last "answer is", "Answer:" or `####`; else the last formula or number.
Linear time in the length of the response.
"""

from __future__ import annotations

import itertools
import re

from dynamo_jax.tasks.grading.latex import closing_brace

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:\[[^\[\]{}]{0,20}\]\s*)?")
_GAP = r"(?:\\[()\[\]]|[\s$*]|\\[,;: !]|\\q?quad)*+"
_JOIN = re.compile(
    rf"{_GAP}(?:,|(?:,\s*)?(?:\\text\s*\{{\s*)?\b(?:and|or)\b(?:\s*\}})?){_GAP}(?:[a-zA-Z](?:_\{{?\w\}}?)?\s*=\s*)?"
)
_CUE = re.compile(
    r"(?:answers?|choice|option)\s{0,4}\**\s{0,4}(?:is|are|:)(?![a-z])\s{0,4}:?|####", re.IGNORECASE
)  # fmt: skip
_FORMULA = re.compile(r"\$\$|(?<!\\)\$|\\\(|\\\)|\\\[|\\\]")
_NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?: \d{3})+(?![\d.])|\d*\.\d+|\d+)(?:\.\d+)?(?:/\d+)?%?"
)
# A line that is one formula without any marks: no words but those that LaTeX commands are made of.
_BARE_LINE = re.compile(r"[-+]?(?:\\[a-zA-Z]+|[-+*/^_=<>(){}\[\],.!|:%\s\d]|(?<![a-zA-Z])[a-zA-Z](?![a-zA-Z]))*+")
_IS = re.compile(r"\b(?:is|are|was|equals|be|to)\b|=", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)")
_CLOSERS = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}


def extract(output: str) -> str | None:
    """The answer that a response gives, as it is written there; None if it gives none."""
    text = output.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    boxes = list(_BOX.finditer(text))
    answer = _boxed(text, boxes) if boxes else _in_prose(text)
    return answer.strip() or None if answer else None


def _boxed(text: str, boxes: list[re.Match[str]]) -> str | None:
    contents: list[str] = []
    following = -1  # where the box after this one starts
    for box in reversed(boxes):
        start = box.end()
        if start >= len(text) or text[start] != "{":
            content, end = (re.split(r"[$\n]", text[start : start + 200])[0], -1) if not contents else ("", -1)
        else:
            # Bounded by the next box, so that all scans together are linear.
            end = closing_brace(text, start, following if following >= 0 else len(text))
            content = text[start + 1 : end] if end >= 0 else ""
        if following >= 0 and (end < 0 or not _JOIN.fullmatch(text, end + 1, following)):
            break
        if not content.strip():
            return None
        contents.append(content)
        following = box.start()
    return ", ".join(reversed(contents))


def _in_prose(text: str) -> str | None:
    cue = next(reversed(list(_CUE.finditer(text))), None)
    if cue is not None and text[cue.end() :].strip(" \n*:.$"):
        return _after_cue(text[cue.end() :])
    last = text.strip().rpartition("\n")[2].strip()
    if len(last) <= 500 and "\\" in last and "$" not in last and _BARE_LINE.fullmatch(last):
        return last
    marks = _formulas(text)
    numbers = list(_NUMBER.finditer(text))
    if marks and not (numbers and numbers[-1].start() > marks[-1][1]):
        return text[marks[-1][0] : marks[-1][1]]
    return numbers[-1].group(0) if numbers else None


def _after_cue(text: str) -> str:
    """The first formula with those joined to it, or else the rest of the sentence."""
    text = text.lstrip(" \n*:")
    marks = _formulas(text)
    sentence = _SENTENCE_END.search(text)
    end = sentence.start() if sentence else len(text)
    inside = [mark for mark in marks if mark[0] < end + 4]
    prose = text[:1].isalpha()
    if prose and inside and (verb := _IS.search(text, inside[0][1], end)):
        # "Answer: The largest $n$ is 34": the formula before the verb is what the answer is about.
        marks = [mark for mark in inside if mark[0] > verb.end()]
        if not marks and text[verb.end() : end].strip(" *$"):
            return text[verb.end() : end].strip(" *`")
        marks = marks or inside
    numbers = list(_NUMBER.finditer(text, 0, end)) if prose and not inside else []
    if len(numbers) == 1 and len(text[: numbers[0].start()].split()) > 1:
        return text[numbers[0].start() : end].strip(" *`")
    if marks and (sentence is None or marks[0][0] < sentence.start() + 4):
        found = [text[slice(*marks[0])]]
        for (_, before), (start, end) in itertools.pairwise(marks):
            if not _JOIN.fullmatch(text, before, start):
                break
            found.append(text[start:end])
        return ", ".join(found)
    text = text[: sentence.start()] if sentence else text
    return text.strip(" *`")


def _formulas(text: str) -> list[tuple[int, int]]:
    """Start and end of the content of every closed formula, in order."""
    spans: list[tuple[int, int]] = []
    opening: re.Match[str] | None = None
    for mark in _FORMULA.finditer(text):
        if opening is None:
            opening = mark if mark.group(0) in _CLOSERS else None
        elif mark.group(0) == _CLOSERS[opening.group(0)]:
            if text[opening.end() : mark.start()].strip():
                spans.append((opening.end(), mark.start()))
            opening = None
        elif mark.group(0) in ("\\(", "\\["):
            opening = mark
    return spans
