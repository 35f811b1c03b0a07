"""Where in a response the answer stands.

1. Only the text after the last `</think>` counts; a `<think>` that never closes gives no answer.
2. The last `\\boxed`, `\\fbox` or `\\framebox` wins; boxes joined by "and", "or" or a comma form a list. A last box
   that is not closed, or is empty, gives no answer.
3. Without a box: what follows the last "answer is", "Answer:", `####`, or the like in Chinese or Japanese;
   else the last formula or number (see `prose.py`).
Linear time in the length of the response.
"""

from __future__ import annotations

import re

from dynamo_jax.tasks.grading.latex import closing_brace
from dynamo_jax.tasks.grading.prose import JOIN, in_prose

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*(?:\[[^\[\]{}]{0,20}\]\s*)?")


def extract(output: str) -> str | None:
    """The answer that a response gives, as it is written there; None if it gives none."""
    text = output.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    boxes = list(_BOX.finditer(text))
    answer = _boxed(text, boxes) if boxes else in_prose(text)
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
        if following >= 0 and (end < 0 or not JOIN.fullmatch(text, end + 1, following)):
            break
        if not content.strip():
            return None
        contents.append(content)
        following = box.start()
    return ", ".join(reversed(contents))
