"""Where in a response the answer stands.

1. Only the text after the last `</think>` counts; a `<think>` that never closes gives no answer. Where the prompt ended
   with the opening, `reopened` puts it back in front.
2. A box (`\\boxed`, `\\fbox` or `\\framebox`) or an `<answer>` tag, in upper or lower case: the last one of all wins.
   One that is not closed, or is empty, gives no answer. Boxes joined by "and", "or" or a comma form a list.
3. A tag holds one answer: a box in it, what follows "the answer is" in it, else all of it. What stands after a tag or a
   box does not count, and neither does a tag that is only spoken of before the last box.
4. Without a box or a tag: what follows the last "answer is", "Answer:", `####`, or the like in Chinese or Japanese;
   else the last formula or number (see `prose.py`).
Linear time in the length of the response.
"""

from __future__ import annotations

import re

from dynamo_jax.tasks.grading.latex import closing_brace
from dynamo_jax.tasks.grading.prose import JOIN, in_prose, stated

THINK, END_OF_THINK = "<think>", "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:\[[^\[\]{}]{0,20}\]\s*)?")
_TAG = re.compile(r"<(/?)answer\s{0,4}>", re.IGNORECASE)
_OPENS_THINKING = re.compile(r"<think>(?:\s*|\n[^<>\[\]]*)\Z")


def extract(output: str) -> str | None:
    """The answer that a response gives, as it is written there; None if it gives none."""
    text = output.rpartition(END_OF_THINK)[2]
    if THINK in text:
        return None
    boxes = list(_BOX.finditer(text))
    tag = _last_tag(text) if "<" in text else None
    if tag is not None and not (boxes and boxes[-1].start() >= tag[1]):
        answer = _tagged(text[slice(*tag)]) if tag[1] > tag[0] else None
    else:
        answer = _boxed(text, boxes) if boxes else in_prose(text)
    return answer.strip() or None if answer else None


def opens_thinking(prompt: str) -> bool:
    """Does the prompt end inside an open `<think>`, as some chat templates write it? Words may follow on a new line.

    A `<think>` that the prompt only speaks of is followed by more text, or by the marks of the next turn.
    """
    return _OPENS_THINKING.search(prompt.rpartition(END_OF_THINK)[2]) is not None


def reopened(output: str) -> str:
    """A response to a prompt that `opens_thinking`, with that `<think>` in front, unless it writes one itself."""
    return output if output.lstrip().startswith(THINK) else THINK + output


def _last_tag(text: str) -> tuple[int, int] | None:
    """Start and end of the content of the last `<answer>`, the same place twice if it is not closed; None if none."""
    span = None
    for tag in _TAG.finditer(text):
        if not tag.group(1):
            span = (tag.end(), tag.end())
        elif span is not None and span[0] == span[1]:
            span = (span[0], tag.start())
    return span


def _tagged(content: str) -> str | None:
    boxes = list(_BOX.finditer(content))
    return _boxed(content, boxes) if boxes else stated(content)


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
        if following >= 0 and (end < 0 or not JOIN.fullmatch(text, end + 1, following)):
            break
        if not content.strip():
            return None
        contents.append(content)
        following = box.start()
    return ", ".join(reversed(contents))
