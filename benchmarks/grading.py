"""The speed of grading: integers on the exact path, mixed references with half of the answers wrong, hostile ones.

`python benchmarks/grading.py --data ../shared` prints one line a measurement: seconds of wall clock and of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import time
from pathlib import Path

from dynamo_jax.tasks import Verifier

BENCHMARKS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
RESPONSES = 4096
HOSTILE_SHARE = 0.01
PROSE = "We start from the given conditions and eliminate the unknowns one at a time. " * 8


def cpu_seconds() -> float:
    """Of this process and its ended children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def golds(data: Path) -> dict[str, list[str]]:
    files = {name: data / "data" / "bench" / f"{name}.jsonl" for name in BENCHMARKS}
    return {n: [str(json.loads(line)["answer"]) for line in f.read_text().splitlines()] for n, f in files.items()}


def mixed(data: Path, rng: random.Random) -> list[tuple[str, str]]:
    """Half right, spelled in another way than the reference; half the answer to another problem of the benchmark."""
    pairs, everything = [], list(golds(data).values())
    for _ in range(RESPONSES):
        answers = rng.choice(everything)
        gold = rng.choice(answers)
        answer = gold if rng.random() < 0.5 else rng.choice([a for a in answers if a != gold])
        if rng.random() < 0.5:
            answer = answer.replace("\\frac", "\\dfrac").replace("+", " + ").replace("\\sqrt{", "\\sqrt {")
        pairs.append((f"{PROSE}Therefore the answer is $\\boxed{{{answer}}}$.", gold))
    return pairs


def measure(name: str, pairs: list[tuple[str, str]]) -> None:
    began, cpu = time.perf_counter(), cpu_seconds()
    with Verifier(workers=2) as verifier:
        grades = verifier.grade_batch(pairs)
        counts = verifier.counts
    wall, used = time.perf_counter() - began, cpu_seconds() - cpu
    print(
        f"{name}: {len(pairs)} answers, {sum(grades)} right, {wall:.1f} s wall, {used:.1f} s CPU with worker start, "
        f"{len(pairs) / used:.0f} a CPU second; {counts['symbolic']} symbolic, {counts['cached']} cached, "
        f"{counts['killed']} killed",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with data/bench and grader/cases.jsonl")
    data = parser.parse_args().data
    rng = random.Random(0)
    integers = [
        (f"{PROSE}So it is $\\boxed{{{rng.randrange(1000)}}}$.", str(rng.randrange(1000))) for _ in range(30000)
    ]
    measure("integers", integers)
    pairs = mixed(data, rng)
    measure("mixed", pairs)
    cases = [json.loads(line) for line in (data / "grader" / "cases.jsonl").read_text().splitlines()]
    hostile = [(c["output"], c["gold"]) for c in cases if c["category"] == "hostile"]
    for index in rng.sample(range(RESPONSES), int(HOSTILE_SHARE * RESPONSES)):
        pairs[index] = rng.choice(hostile)
    measure("mixed with 1% hostile", pairs)
    slowest(hostile)


def slowest(hostile: list[tuple[str, str]]) -> None:
    """The most CPU time that one hostile answer takes, here and in its worker together."""
    seconds = []
    with Verifier(workers=1) as verifier:
        verifier.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")  # starts the worker
        (worker,) = (w.process for w in verifier._pool.workers)
        for output, gold in hostile:
            began = time.process_time() + process_seconds(worker.pid if worker else 0)
            verifier.grade(output, gold)
            seconds.append(time.process_time() + process_seconds(worker.pid if worker else 0) - began)
        killed = verifier.counts["killed"]
    print(f"hostile one by one: {len(seconds)} answers, at most {max(seconds):.2f} s CPU each, {killed} killed")


def process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
