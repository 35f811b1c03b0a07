"""The answer of a sentence in Chinese or Japanese, where letters stand right against numbers.

The value is what comes before the first letter of these scripts: "42。", "42です", "$x=3$ 或 $x=5$". What makes
another number of it ("42万", "42以上", "2的平方") stays with it, so that it is compared; what is denied or corrected
("42ではない", "42，不对") is none.
"""

# ruff: noqa: RUF001 - full-width punctuation is the subject

from __future__ import annotations

import re

LETTERS = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
LETTER = re.compile(rf"[{LETTERS}]")
CUE = (
    r"(?:答案|最终结果|最終結果|答え|こたえ|正解|正答|解答(?=は))】?\s{0,4}(?:应该|應該|应当|应|應|就|即)?"
    r"(?:是|为|為|等于|等於|选|選|は|[:：】])\s{0,4}[:：]?|(?<!\w)答\s?[:：]"
    r"|(?<!不)(?:选|選)[择擇项項]?[是为為]?\s{0,4}[:：]?\s{0,4}"
    r"(?=[（(]?[A-JＡ-Ｊ][）)]?(?:[选選]?[项項])?\s{0,4}(?:[。．.,，；;！!\n]|\Z))"
)
JOINS = "和与與及或と、"
_JOIN = re.compile(rf"(?:以及|或者|或是|还是|還是|または|もしくは|および|及び|か|[{JOINS}])\s*(?=[-+\da-zA-Z$\\(（])")
# Units begin alike: 千克, 平方米.
CHANGED = re.compile(
    r"(?:\s*(?:[个個]?(?:[万萬亿億百十多半又的加减減乘除余餘か吗嗎吧]|千(?![克米瓦卡])|兆(?![瓦赫]))|以[上下内內外]|左右|分之|"
    r"之[间間]|より|(?:平方|立方)(?![厘米公千分毫英里センチメ])|次方|阶乘|階乗|未満|以下))+"
)
_DENIED = re.compile(
    r"[\s,，、；;。$*]*(?:不|并非|並非|而不|而非|错|錯|但|等等|等一下|应该|應該|应[为為是]|では(?:ない|なく|あり)|じゃ|いや)"
)
_ANOTHER = re.compile(r"(?<![，,。；;：:（(\s])[^，,。；;：:（(]*?[\d$\\]")  # "42小时30分钟"
_CORRECTED = re.compile(r"等等|等一下|更正|错了|錯了|[,，。]\s*不[,，、对對]|[应應][该該]?[是为為]|いや、|違う|間違")
BOUND_BEFORE = (
    r"(?:不[^\s\d,，。]{0,3}[是为為]|不等于|不等於|可能是|也许是|或许是|并非|小于|大于|少于|多于|至少|至多|最多|最少|超过|不到"
    r"|分之|负|負|根号|根號|\d\s*[个個]?(?:或|还是|か|または))\s*\Z"
)
_SECOND_THOUGHT = re.compile(r"\W*(?:不[,，、对對是]|等等|等一下|错了|錯了|更正|いや)")


def value(sentence: str) -> str | None:
    """The value that `sentence` begins with; None if it is taken back."""
    sentence = re.sub("等于|等於", "=", sentence)
    parts, start = [], 0
    while True:
        letter = LETTER.search(sentence, start)
        end = letter.start() if letter else len(sentence)
        join = _JOIN.match(sentence, end)
        parts.append(sentence[start:end])
        if join is None:
            break
        start = join.end()
    found = ", ".join(part.strip(" ,，、；;(（") for part in parts)
    if found and _ANOTHER.match(sentence, end):
        return found + sentence[end:].strip()
    changed = CHANGED.match(sentence, end) if found else None
    end = changed.end() if changed else end
    if denied(sentence, end) or _CORRECTED.search(sentence, end):
        return None
    return found + changed.group(0).strip() if changed else found


def denied(text: str, place: int) -> bool:
    """Is the value that ends at `place` denied by what follows it?"""
    return _DENIED.match(text, place) is not None


def second_thought(text: str) -> bool:
    """Does `text`, which follows the sentence of an answer, begin by taking the answer back?"""
    return _SECOND_THOUGHT.match(text) is not None
