"""Random answers against the grader: no exception, no hang, no worker left behind, flat memory.

`python benchmarks/fuzz_grading.py --answers 100000 --data ../shared/data/bench`

Answers are references of the benchmarks that have been cut, joined, repeated and filled with LaTeX at random; a third
are nothing but random pieces. Half of them stand in a box, the others in a tag, behind a cue in English, Chinese or
Japanese, or in emphasis, with random words about them. Every answer is graded; a batch of 5,000 at a time, after which
memory is read.
"""

# ruff: noqa: RUF001, SIM905 - look-alike characters are among the pieces; a line of pieces reads better than a list

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

from dynamo_jax.tasks import Verifier

PIECES = [
    *r"\frac \dfrac{ \sqrt \sqrt[3] \pi \infty \sin \ln \log_ \binom \cdot \times \pm \mp \cup \in".split(),
    *r"\le \{ \} \\ \text{ \left \right \begin{pmatrix} \end{pmatrix} \sum_{k=1}^{n} \int_0^1 \lim \setminus".split(),
    *r"\mathbb{R} \circ ^\circ \overline{3} \boxed{ \lfloor \rfloor \max \gcd \bmod \pmod \ne \exp".split(),
    *r"< > = != { } ( ) [ ] | , ; : . ! ^ _ + - * / % $ & 0 1 2 3 10 99 1000000 0.5 1e5 x y n k i e a b f(x)".split(),
    *"and or ½ ² π √ ° × − ∞ ≤ __import__('os') lambda".split(),
    *("\u202e", "\x00", "\ud800"),
]
PLACES = [
    *("The answer is {}{}.", "Answer: ${}${}", "**Final Answer: {}**{}", "#### {}{}", "So we get **{}** ✅{}"),
    *("<answer>{}{}</answer>", "<think>{}</think><answer>${}$</answer>", "<ANSWER>\n{}\n</ANSWER>{}", "{} <answer>{}"),
    *("答案是{}。{}", "所以一共有{}{}。", "故选{}{}", "答えは${}${}です。", "答案：{}{}", "{}</think>{}"),
]
WORDS = [
    *(" because {}", " (since {} = {})", ", which is {}", " if {}, {} if not", ", no, {}", ", so {}", " - or {}"),
    *(" or {}", " and {}", "; {}", " million", " is wrong", ", not {}", ". Wait, {}", " ($9 - $2)", "，因为{}", "或{}"),
    *("万", "個", "ではない", "，不，是{}", " __{}__", " **{}**", " `{}`", "", "", "", "", ""),
]


def mutate(rng: random.Random, answers: list[str]) -> str:
    kind = rng.random()
    if kind < 0.33:
        return rng.choice(("", " ")).join(rng.choices(PIECES, k=rng.randint(1, 40)))
    text = rng.choice(answers)
    for _ in range(rng.randint(1, 4)):
        cut, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        action = rng.randrange(5)
        if action == 0:
            text = text[:cut] + text[end:]
        elif action == 1:
            text = text[:cut] + rng.choice(PIECES) + text[cut:]
        elif action == 2:
            text = text[:end] + text[cut:end] * rng.randint(1, 5) + text[end:]
        elif action == 3:
            text = text[:cut] + rng.choice(answers) + text[cut:]
        else:
            text = text[:cut] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0xD7FF)))) + text[cut + 1 :]
    return text[:3000]


def response(rng: random.Random, answer: str, others: list[str]) -> str:
    if rng.random() < 0.5:
        return f"So \\boxed{{{answer}}}"
    words = rng.choice(WORDS)
    for _ in range(words.count("{}")):
        words = words.replace("{}", rng.choice((answer, rng.choice(others))), 1)
    return rng.choice(PLACES).replace("{}", answer, 1).replace("{}", words, 1)


def resident_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--answers", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="accepted answers to print, for reading by eye")
    parser.add_argument("--data", type=Path, required=True, help="the folder of benchmark files")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    lines = [line for file in sorted(arguments.data.glob("*.jsonl")) for line in file.read_text().splitlines()]
    golds = [str(json.loads(line)["answer"]) for line in lines]
    began, accepted = time.perf_counter(), []
    with Verifier(workers=2, timeout=2.0) as verifier:
        for done in range(0, arguments.answers, 5000):
            size = min(5000, arguments.answers - done)
            pairs = []
            for gold in rng.choices(golds, k=size):
                answer = mutate(rng, [gold] if rng.random() < 0.6 else golds)
                pairs.append((response(rng, answer, golds), gold))
            accepted += [pair for pair, right in zip(pairs, verifier.grade_batch(pairs), strict=True) if right]
            workers = [w.process.pid for w in verifier._pool.workers if w.process is not None]
            print(
                f"{done + size} answers, {time.perf_counter() - began:.0f} s, {len(accepted)} accepted, "
                f"{verifier.counts}, {resident_mb(os.getpid()):.0f} MB here, "
                f"{[round(resident_mb(pid)) for pid in workers]} MB in workers",
                flush=True,
            )
        for gold, answer in verifier.killed_answers:
            print("killed:", repr(gold), repr(answer[:300]))
    for output, gold in rng.sample(accepted, min(arguments.show, len(accepted))):
        print("accepted:", repr(gold), repr(output[-300:]))
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    print(f"no exception, no hang; {len(left)} workers left behind")


if __name__ == "__main__":
    main()
