"""Reference answers of the usual benchmarks that are known to be wrong or ungradable: listed, never changed."""

from __future__ import annotations

# (id of the problem, its reference answer as the file has it): what is wrong with it
KNOWN_GOLDS: dict[tuple[str, str], str] = {
    ("olympiad-2498", r"\frac{1}{2},\sqrt{x}"): r"wrong: y as a function of x is \frac{1}{2}\sqrt{x}, not a list",
    ("olympiad-2045", "t(0,4]"): "malformed: t in (0,4] is meant; only this text is accepted",
    (
        "olympiad-1965",
        "f(x)=a x+b, where b is an arbitrary integer, and a is an arbitrary positive integer with \\mho(a)=0",
    ): "prose: only the same text is accepted",
}
# Lists whose order the question fixes; lists are compared without order, so a permuted answer is accepted.
ORDERED_LISTS = frozenset(("olympiad-2349", "olympiad-2356", "olympiad-2382", "olympiad-2490", "olympiad-2532"))


def known_problem(problem_id: str, gold: str) -> str | None:
    """What is known to be wrong with a reference answer, or with how it can be compared; None for most."""
    if problem_id in ORDERED_LISTS:
        return "a list whose order matters: a permuted answer is accepted"
    return KNOWN_GOLDS.get((problem_id, gold))
