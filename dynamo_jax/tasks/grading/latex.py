"""One spelling for many: Unicode and LaTeX of an answer reduced to a small, fixed set of tokens.

After `normalise`, text is in double quotes (`45 "min"`), products are `\\cdot`, every fraction is `\\frac`,
a matrix row ends with `\\cr`, degree signs, math delimiters, sizes and colours are gone. Linear time.
"""

# ruff: noqa: RUF001, SIM905 - the look-alike characters are the subject; a line of words reads better than a list

from __future__ import annotations

import re
import unicodedata

from dynamo_jax.tasks.grading.numerals import spell_out

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "‐": "-", "‑": "-", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "∗": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ",
    "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "√": r"\sqrt ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "⌀": r"\emptyset ", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "°": "", "º": "", "…": r"\ldots ", "∑": r"\sum ", "∏": r"\prod ",
    "∫": r"\int ", "′": "'", "∠": r"\angle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ",
    "€": "", "¢": "", "£": "", "¥": "", "₹": "", "∖": r"\setminus ", "←": r"\leftarrow ", "→": r"\to ",
    "，": ",", "、": ",", "；": ";", "。": ".", "“": "", "”": "",
}  # fmt: skip
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma sigma tau upsilon "
    "phi chi psi omega"
).split()
_SYMBOLS |= {chr(0x3B1 + i): f"\\{name} " for i, name in enumerate(GREEK)}
_SYMBOLS |= {"ϕ": r"\phi ", "Δ": r"\Delta ", "Σ": r"\Sigma ", "Ω": r"\Omega ", "Γ": r"\Gamma ", "Φ": r"\Phi "}

_TEXT = "text textbf textit textrm textsf texttt textnormal textup emph mbox hbox mathrm mathit rm bf".split()
_COMMANDS = {
    **dict.fromkeys(_TEXT, r"\text"),
    **dict.fromkeys("mathbf boldsymbol bm mathsf mathcal mathtt vec pmb ensuremath".split(), ""),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac"),
    **dict.fromkeys("dbinom tbinom".split(), r"\binom"),
    **dict.fromkeys("times cdot ast".split(), r"\cdot "),
    **dict.fromkeys("dots ldots cdots dotsc dotsb".split(), r"\ldots "),
    **dict.fromkeys("vert lvert rvert".split(), "|"),
    **dict.fromkeys("degree textdegree displaystyle textstyle scriptstyle limits nolimits noindent".split(), ""),
    **dict.fromkeys("quad qquad enspace thinspace thickspace medspace space newline".split(), " "),
    "geq": r"\ge ", "geqslant": r"\ge ", "leq": r"\le ", "leqslant": r"\le ", "neq": r"\ne ", "lt": "<", "gt": ">",
    "div": "/", "lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "varnothing": r"\emptyset ",
    "imath": "i", "odot": "o", "oplus": "o",
    "lg": r"\log_{10}", "tg": r"\tan", "ctg": r"\cot", "arctg": r"\arctan", "colon": ":",
    "varphi": r"\phi ", "varepsilon": r"\epsilon ", "varrho": r"\rho ", "vartheta": r"\theta ",
    **dict.fromkeys("underline underbrace uline tiny small normalsize large Large LARGE huge Huge".split(), ""),
    **dict.fromkeys("checkmark blacksquare square Box qed bbox cent textcent".split(), ""),
    "backslash": r"\setminus ", "smallsetminus": r"\setminus ", "longrightarrow": r"\to ", "rightarrow": r"\to ",
    "mapsto": r"\to ", "euro": "", "pounds": "", "approxeq": r"\approx ",
    "thickapprox": r"\approx ", "simeq": r"\approx ",
    "R": r"\mathbb{R}", "infin": r"\infty ", "mod": r"\bmod ", "iff": r"\Leftrightarrow ",
}  # fmt: skip
_SIZES = re.compile(r"\\(?:(?:left|right)(?![a-zA-Z])\s*\.?|(?:[bB]igg?[lrm]?)(?![a-zA-Z]))")
_COLOUR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:label|tag|hspace|vspace)\s*\{[^{}]*\}")
_THIN = re.compile(r"(?<=\d) ?(?:\{ ?, ?\}|,\\!|\\[,;: !]|~)\s*(?=\d{3}(?!\d))")
_SPACES = re.compile(r"\\[,;:!> ]|~")
# After a currency these letters are no units: `\$5\text{K}` is 5000, `5\text{K}` a temperature.
_MONEY = re.compile(
    r"((?:\\\$|[€£¥₹]) ?\d[\d.,]*) ?(\\(?:text|mathrm|mbox) ?\{ ?)?([kKMBT]|bn|mn)(?![a-zA-Z])(?(2) ?\})"
)
_MONEY_SUFFIXES = {"k": "thousand", "m": "million", "b": "billion", "t": "trillion"}
_UNIT_FRACTION = re.compile(r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}")
_MICRO = re.compile(r"\\mu\s*\\text\s*\{\s*([a-zA-Z])")
_CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![a-zA-Z])([^{}]*)\}")
_BOLD_TEXT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathsf)(?=\s*\{\s?[A-Za-z]{2})")
_MODULUS = re.compile(r"\\pmod\s*(?:\{\s*([^{}]*)\}|(\w+))")
_HAT = re.compile(r"\\(?:hat|widehat)\s*(?:\{\s*([ijk])\s*\}|([ijk])(?![a-zA-Z]))")
_COMPARISON = re.compile(r"<=|>=|=<|(?<=\s)!=|(?<=[a-zA-Z])!=(?=\s)")
_COMPARISONS = {"<=": r"\le ", "=<": r"\le ", ">=": r"\ge ", "!=": r"\ne "}
_BASED = re.compile(r"\(\s*([0-9A-Fa-f]+)\s*\)\s*(?=_)")
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_OPERATOR = re.compile(r"\\operatorname\*?\s*\{\s*([a-zA-Z]+)\s*\}")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))")
_DEGREE = r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|°|º|\\(?:text)?degree(?![a-zA-Z]))"
_TRIGONOMETRY = re.compile(r"(?<!arc)(?<!a)(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_ANGLE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*" + _DEGREE)
_PRIME = re.compile(r"\^\s*(?:\{\s*\\prime\s*\}|\\prime(?![a-zA-Z]))")
_FUNCTION = re.compile(
    r"(?<![\\a-zA-Z])(?:(?:np|numpy|math)\.)?"
    r"(arc(?:sin|cos|tan)|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|sqrt|pi|infty|infinity"
    r"|(?:exp|max|min|gcd|lcm|floor|ceil)(?=\s*\())(?![a-zA-Z])"
)
_NATURAL = re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e)")
_PERCENT = re.compile(r'"?\s*(?<![a-zA-Z])(?:percent|per cent)(?![a-zA-Z])\s*"?')
_WITH_ARGUMENTS = re.compile(r"(\\(?:frac|binom|sqrt)(?![a-zA-Z])|\^)\s*(?:\[[^\[\]]*\])?")
_ARGUMENT = re.compile(r"\s*([{(\da-zA-Z]|\\(?!frac|binom|sqrt)[a-zA-Z]+)")
_SYMBOLS_IN_TEXT = "ABCDEFabdeinpqrwxyz"  # other single letters in text are units
_FUNCTIONS_IN_TEXT = frozenset("pi ln log sin cos tan cot arcsin arccos arctan sinh cosh tanh".split())
_LETTERS = re.compile(r"[a-zA-Z]")
_DIGITS = re.compile(r"\d+")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def normalise(text: str) -> str:
    """The answer in one spelling; see the module's docstring. Never raises."""
    text = " ".join(text.split())
    if "\\$" in text or not text.isascii():
        text = _MONEY.sub(lambda m: f"{m[1]}\\text{{{_MONEY_SUFFIXES[m[3][0].lower()]}}}", text)
    text = _unicode(in_radians(text))
    if "\\begin" not in text:  # a response that was escaped twice; in a matrix `\\` ends a row
        text = re.sub(r"\\\\(?=[a-zA-Z%$])", r"\\", text)
    text = _COLOUR.sub("", text).replace("\\\\", "\\cr ")
    text = _THIN.sub("", _SIZES.sub("", text))
    text = re.sub(r"\\[()\[\]]|\\?\$", " ", _SPACES.sub(" ", text))
    if "  " in text:  # what follows looks past spaces more than once
        text = " ".join(text.split())
    text = text.replace("\\%", "%").replace("\\_", "_").replace("\\&", "&").replace('"', "").replace("{,}", ",")
    text = _PRIME.sub("'", text)
    text = _HAT.sub(r"\1\2", _CHOOSE.sub(r"\\binom{\1}{\2}", text))
    text = _COMPARISON.sub(lambda m: _COMPARISONS[m.group(0)], text)
    text = _DEGREES.sub("", _OPERATOR.sub(r"\\\1 ", text))
    text = _BOLD_TEXT.sub(r"\\text", text)
    text = _MODULUS.sub(r"\\pmod{\1\2}" if "\\equiv" in text else "", text)
    text = _COMMAND.sub(lambda m: _COMMANDS.get(m.group(1), m.group(0)), text)
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", text)
    text = _MICRO.sub(r"\\text{u\1", text)
    text = _quote_text(text)
    text = _PERCENT.sub("%", text)
    text = _FUNCTION.sub(lambda m: f"\\{'infty' if m.group(1) == 'infinity' else m.group(1)} ", text)
    text = _NATURAL.sub(r"\\ln ", text)
    text = text.strip(" *`").replace("**", "^").replace("*", "\\cdot ")
    text = _braced_arguments(_BASED.sub(r"\1", text))
    text = re.sub(r"(?<=\d) ?x ?(?=10\^)", r"\\cdot ", text)
    text = re.sub(r"(?<![\d.])\d{1,3}(?: \d{3})+(?![\d.])", lambda m: m.group(0).replace(" ", ""), text)
    text = " ".join(text.split()).rstrip(" .,;:").lstrip(" ,;:")
    return text if text.isdigit() else _unwrap(spell_out(text))


def in_radians(text: str, always: bool = False) -> str:
    """`30^\\circ` as `\\frac{30\\pi}{180}` where degrees matter: inside a trigonometric function, or `always`."""
    if not always and not _TRIGONOMETRY.search(text):
        return text
    return _ANGLE.sub(r"\\frac{\1\\pi}{180}", text)


def key(text: str) -> str:
    """A normalised answer without the differences that never matter: spaces, braces around one character."""
    text = re.sub(r"(?<=[\w.]) (?=[\d.])", "~", text)  # `2 3` is not 23
    return re.sub(r"\{(\w)\}", r"\1", text.replace(" ", ""))


def _unicode(text: str) -> str:
    if text.isascii():
        return text
    out: list[str] = []
    mode = ""  # "^" or "_" while inside a run of raised or lowered characters
    for char in text:
        kind = "" if char in _SYMBOLS else unicodedata.decomposition(char)
        raised = "^" if kind.startswith("<super>") else "_" if kind.startswith("<sub>") else ""
        if raised != mode:
            out.append(("}" if mode else "") + (f"{raised}{{" if raised else ""))
            mode = raised
        if char in _SYMBOLS:
            out.append(_SYMBOLS[char])
        elif kind.startswith(("<circle>", "<compat>")) and unicodedata.category(char) == "No":
            out.append(char)  # a circled digit numbers an item
        elif kind.startswith("<fraction>"):
            top, _, bottom = unicodedata.normalize("NFKC", char).partition("\u2044")
            out.append(f"\\frac{{{top}}}{{{bottom or 1}}}")
        elif unicodedata.category(char) == "Nd":
            out.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) not in ("Cf", "Cc"):  # direction marks, zero-width spaces
            plain = unicodedata.normalize("NFKC", char)
            out.append(" " if plain.isspace() else "".join(_SYMBOLS.get(c, c) for c in plain))
    if mode:
        out.append("}")
    return "".join(out)


def _quote_text(text: str) -> str:
    """`\\text{abc}` becomes `"abc"`; text that holds digits, mathematics or one letter is unwrapped instead."""
    out: list[str] = []
    depth = position = 0
    for match in re.finditer(r"\\text\s*\{((?:[^{}\\]|\^\{-?\d\})*)\}|\\[{}]|[{}]|\\text(?![a-zA-Z])", text):
        out.append(text[position : match.start()])
        position = match.end()
        token, content = match.group(0), match.group(1)
        if content is not None:
            letters = content.strip(" ().:")
            plain = depth > 0 or (len(letters) < 2 and letters in _SYMBOLS_IN_TEXT) or any(c.isdigit() for c in content)
            plain = plain or letters in _FUNCTIONS_IN_TEXT or (content.isascii() and not _LETTERS.search(content))
            out.append(f" {content.strip() if depth else content} " if plain else f' "{content.strip()}" ')
        elif not token.startswith("\\text"):
            depth += {"{": 1, "}": -1}.get(token, 0)
            out.append(token)
    out.append(text[position:])
    return "".join(out)


def _braced_arguments(text: str) -> str:
    """Braces around every argument: `\\frac12`, `\\sqrt 2`, `\\sqrt(..)`, `^(..)`, and `x^10` with the whole number."""
    text = re.sub(r"\^\s*(-?\d{2,}|-\d|-[a-zA-Z](?![a-zA-Z]))(?![\d.])", r"^{\1}", text)
    closing = _pairs(text)
    before: dict[int, str] = {}  # what replaces the characters at these places
    for match in _WITH_ARGUMENTS.finditer(text):
        name, position = match.group(1), match.end()
        for _ in range(2 if name in ("\\frac", "\\binom") else 1):
            argument = _ARGUMENT.match(text, position)
            if argument is None:
                break
            start, position = argument.span(1)
            if text[start] == "{":
                position = closing.get(start, len(text)) + 1
            elif text[start] == "(":
                if name in ("^", "\\sqrt") and start in closing:
                    before[start], before[closing[start]] = "{", "}"
                break
            elif name == "^":
                break
            else:
                if name == "\\sqrt" and text[start].isdigit():
                    position = _DIGITS.match(text, start).end()  # type: ignore[union-attr]
                before[start] = before.get(start, "") + "{" + text[start]
                last = position - 1
                before[last] = (before[last] if last == start else before.get(last, "") + text[last]) + "}"
    return "".join(before.get(i, char) for i, char in enumerate(text)) if before else text


def _pairs(text: str) -> dict[int, int]:
    """From every opening brace or parenthesis to its closing one."""
    pairs: dict[int, int] = {}
    opened: list[tuple[str, int]] = []
    for match in re.finditer(r"\\.|[{}()]", text):
        mark = match.group(0)
        if mark in "{(":
            opened.append((mark, match.start()))
        elif mark in "})" and opened and opened[-1][0] + mark in ("{}", "()"):
            pairs[opened.pop()[1]] = match.start()
    return pairs


def _unwrap(text: str) -> str:
    """Without braces around the whole text."""
    for _ in range(4):
        if not text.startswith("{") or closing_brace(text, 0) != len(text) - 1:
            break
        text = text[1:-1].strip()
    return text


def closing_brace(text: str, start: int, end: int | None = None) -> int:
    """Index of the brace that closes the one at `start`, -1 if none before `end` does. Escaped braces do not count."""
    depth = 0
    for match in _BRACES.finditer(text, start, len(text) if end is None else end):
        depth += {"{": 1, "}": -1}.get(match.group(0), 0)
        if depth == 0:
            return match.start()
    return -1
