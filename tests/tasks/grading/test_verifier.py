"""Grading end to end: the symbolic path, the workers' limits, their death and replacement, and the labelled answers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dynamo_jax.tasks.grading import pool as module
from dynamo_jax.tasks.grading.verifier import Verifier, grade

# One case a line: reference, `==` right or `!=` wrong, answer. All need algebra.
SYMBOLIC = r"""
2\sqrt{2}  ==  \sqrt{8}
2\sqrt2  !=  2.828
2\sqrt2  !=  2\sqrt{3}
\frac{\sqrt{3}}{3}  ==  \frac{1}{\sqrt3}
3\pi  ==  3\pi \text{ cm}^2
3\pi  !=  9.42
3\pi  !=  3
1+\sqrt{3} i  ==  2e^{i\pi/3}
-1  ==  e^{i\pi}
3  ==  \log_2 8
262537412640768744  !=  e^{\pi\sqrt{163}}
x^2+2x+1  ==  (x+1)^2
x^2+2x+1  !=  (x-1)^2
6m  !=  6M
p-q  !=  q-p
|x|  !=  x
\ln(ab)  ==  \ln a+\ln b
\cot x  ==  \frac{\cos x}{\sin x}
\sec^2 y  ==  1+\tan^2 y
\lfloor n/2 \rfloor  !=  \frac{n}{2}
\frac{n(n+1)}{2}  ==  \binom{n+1}{2}
n!  ==  n(n-1)!
\frac{1}{3} E_{1}+\frac{2}{3} E_{2}  ==  \frac{E_1+2E_2}{3}
I(0) e^{-\frac{t}{R C}}  ==  I(0)e^{-t/(RC)}
m \frac{d v}{d t}+b v=f  ==  m\frac{dv}{dt}=f-bv
y=2x+1  ==  2x-y+1=0
y=2x+1  !=  x=2y+1
x=3  !=  x^2-6x+9=0
x=3  !=  y=3
f(n)=2n+1  ==  f(x)=1+2x
1 \pm \sqrt{19}  ==  1-\sqrt{19}, 1+\sqrt{19}
1 \pm \sqrt{19}  !=  1+\sqrt{19}
(-\sqrt{12}, 1]  ==  -2\sqrt3 < x \le 1
(4, \log_{10} 2)  !=  (4, 0.301)
\begin{pmatrix} \sqrt{2} \\ 1 \end{pmatrix}  ==  \begin{bmatrix} 2/\sqrt{2} \\ 1 \end{bmatrix}
"""
BUSY = r"\boxed{\binom{10^9}{\pi}}"  # keeps sympy in one C-speed loop for minutes


def cases() -> list[tuple[str, str, bool]]:
    rows = (line.split("  ") for line in SYMBOLIC.strip().splitlines())
    return [(f"So it is $\\boxed{{{answer}}}$.", gold, sign == "==") for gold, sign, answer in rows]


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier(workers=2, timeout=5.0) as shared_verifier:
        yield shared_verifier


def processes(of: Verifier) -> list[int]:
    return [w.process.pid for w in of._pool.workers if w.process is not None]


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_symbolic_answers_in_order(verifier: Verifier) -> None:
    labelled = cases()
    grades = verifier.grade_batch([(output, gold) for output, gold, _ in labelled])
    assert [(g, o) for (o, g, right), grade in zip(labelled, grades, strict=True) if grade is not right] == []


def test_order_is_kept_when_paths_mix(verifier: Verifier) -> None:
    pairs, expected = [], []
    for k in range(40):
        pairs += [(f"\\boxed{{{k}}}", "7"), (f"\\boxed{{\\sqrt{{{k * k * 2}}}}}", "7\\sqrt{2}"), ("no", "7")]
        expected += [k == 7, k == 7, False]
    assert verifier.grade_batch(pairs) == expected
    assert verifier.grade_batch([]) == []


def test_exact_answers_start_no_worker() -> None:
    with Verifier() as fresh:
        assert fresh.grade_batch([("\\boxed{1}", "1"), ("\\boxed{0.5}", "\\frac{1}{2}"), ("", "3")]) == [
            True,
            True,
            False,
        ]
        assert processes(fresh) == []
        assert fresh.counts["starts"] == 0


def test_repeated_answers_are_asked_once(verifier: Verifier) -> None:
    before = verifier.counts
    pair = ("\\boxed{\\sqrt{50}}", "5\\sqrt{2}")
    assert verifier.grade_batch([pair] * 8) == [True] * 8
    assert verifier.grade_batch([pair]) == [True]
    after = verifier.counts
    assert after["symbolic"] - before["symbolic"] == 1
    assert after["cached"] - before["cached"] == 1
    assert after["graded"] - before["graded"] == 9


def test_grading_from_many_threads(verifier: Verifier) -> None:
    labelled = cases()[:12]
    wrong: list[str] = []

    def work() -> None:
        grades = verifier.grade_batch([(output, gold) for output, gold, _ in labelled])
        wrong.extend(gold for (_, gold, right), grade in zip(labelled, grades, strict=True) if grade is not right)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_the_kernel_ends_an_answer_that_takes_too_long() -> None:
    with Verifier(workers=1, timeout=1.0) as small:
        start = time.monotonic()
        assert small.grade_batch([(BUSY, r"x+\sqrt{2}"), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}")]) == [False, True]
        assert time.monotonic() - start < 40
        counts = small.counts
        assert (counts["timeouts"], counts["crashes"], counts["killed"], counts["starts"]) == (1, 0, 1, 2)
        assert small.killed_answers[0][0] == r"x+\sqrt{2}"
        assert small.grade(BUSY, r"x+\sqrt{2}") is False  # known now: no second kill
        assert small.counts["timeouts"] == 1


def test_the_text_of_a_killed_answer_is_saved(tmp_path: Path) -> None:
    file = tmp_path / "killed.jsonl"
    with Verifier(workers=1, timeout=1.0, killed_file=file) as small:
        assert small.grade(BUSY, r"x+\sqrt{2}") is False
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row == {"cause": "timeout", "kind": "math", "gold": r"x+\sqrt{2}", "answer": BUSY[7:-1]}


def test_a_worker_is_replaced_before_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECYCLE", 2)
    with Verifier(workers=1) as small:
        pairs = [(f"\\boxed{{\\sqrt{{{k * k * 2}}}}}", f"{k}\\sqrt{{2}}") for k in range(2, 7)]
        assert small.grade_batch(pairs) == [True] * 5
        assert (small.counts["starts"], small.counts["crashes"], len(processes(small))) == (3, 0, 1)


def test_references_that_nothing_can_equal(verifier: Verifier) -> None:
    good = ["42", r"2\sqrt{2}", r"\frac{x}{y}=2", "(1, x)", r"\text{even}", "B", r"\{1, \pi\}", "1:2", r"[0, \infty)"]
    assert verifier.unreadable(good) == [None] * len(good)
    bad = [
        "",
        "t(0,4]",
        r"\frac{1}{2",
        r"\begin{cases} 1 \\ 2 \end{cases}",
    ]
    for gold, reason in zip(bad, verifier.unreadable(bad), strict=True):
        assert "reference answer" in (reason or ""), gold


def test_more_answers_than_fit_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PENDING", 2)
    with Verifier(workers=1) as small:
        pairs = [(f"\\boxed{{{k}\\sqrt{{8}}}}", f"{2 * k}\\sqrt{{2}}") for k in range(1, 9)]
        assert small.grade_batch(pairs) == [True] * 8


def test_a_turn_of_degrees_is_not_cached_as_a_number(verifier: Verifier) -> None:
    answers = [r"\boxed{30^\circ}", r"\boxed{30}", r"\boxed{30^\circ}"]
    assert [verifier.grade(answer, r"\frac{\pi}{6}") for answer in answers] == [True, False, True]


def test_wall_clock_is_behind_the_cpu_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen worker uses no CPU time. What it was asked is asked once more, of a fresh one, but not for ever."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.1)
    with Verifier(workers=1) as small:
        (worker,) = small._pool.workers
        start = worker.start

        def freeze() -> None:
            os.kill(*processes(small), signal.SIGSTOP)
            worker.wall = 0.5

        def unhurried() -> None:
            start()
            worker.wall = 60.0  # the machine may be busy

        def frozen() -> None:
            start()
            freeze()

        assert small.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
        (pid,) = processes(small)
        freeze()
        monkeypatch.setattr(worker, "start", unhurried)
        assert small.grade(r"\boxed{\sqrt{18}}", r"3\sqrt{2}") is True  # not the answer's fault
        assert (small.counts["timeouts"], small.counts["starts"]) == (0, 2)
        assert not exists(pid)
        assert small.counts["waits"] > 0  # others, who may wait for this process, see the counts move meanwhile
        freeze()
        monkeypatch.setattr(worker, "start", frozen)
        assert small.grade(r"\boxed{\sqrt{50}}", r"5\sqrt{2}") is False
        assert (small.counts["timeouts"], small.counts["starts"]) == (1, 3)
        with pytest.raises(module.Killed, match="timed out"):  # nobody takes what is too long for a pipe
            small._pool.submit(small._pool.ask, "parse", "1", "x" * 10**6).result(30)
        monkeypatch.setattr(worker, "start", unhurried)
        assert small.grade(r"\boxed{\sqrt{32}}", r"4\sqrt{2}") is True


def test_a_worker_killed_from_outside_is_replaced() -> None:
    with Verifier(workers=1, timeout=1.0) as small:
        assert small.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
        (idle,) = processes(small)
        os.kill(idle, signal.SIGKILL)
        assert wait_until(lambda: small._pool.workers[0].process.poll() is not None)  # type: ignore[union-attr]
        assert small.grade(r"\boxed{\sqrt{18}}", r"3\sqrt{2}") is True  # it was idle: nothing is lost
        assert small.counts["crashes"] == 0

        (busy,) = processes(small)
        killer = threading.Timer(0.3, os.kill, (busy, signal.SIGKILL))
        killer.start()
        assert small.grade_batch([(BUSY, "x+1"), (r"\boxed{\sqrt{32}}", r"4\sqrt{2}")]) == [False, True]
        killer.join()
        # Killed while it was asked: asked once more, and what takes too long is then ended by our own limit.
        assert (small.counts["crashes"], small.counts["timeouts"], small.counts["starts"]) == (0, 1, 4)


def test_memory_is_limited_beyond_the_size_at_start() -> None:
    code = (
        "import resource, sys\n"
        "sys.argv = ['', '5', '64']\n"
        "from dynamo_jax.tasks.grading import verifier_worker as w\n"
        "w._limit_memory(64)\n"
        "bytearray(16 << 20)\n"
        "try:\n    bytearray(256 << 20)\n"
        "except MemoryError:\n    sys.exit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 7


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(module.__file__).resolve().parents[3])}


def test_workers_do_not_import_jax() -> None:
    code = (
        "import sys, dynamo_jax.tasks.grading.verifier_worker, dynamo_jax.tasks.grading.symbolic\n"
        "sys.exit(any(m in sys.modules for m in ('jax', 'flax', 'grain', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0


def test_no_text_is_evaluated_in_a_worker(tmp_path: Path) -> None:
    code = (
        "import sympy\nfrom dynamo_jax.tasks.grading.symbolic import forbid_evaluation\nforbid_evaluation()\n"
        "if sympy.Number('42') + sympy.sympify('0.5') != sympy.Rational(85, 2): raise SystemExit('numbers')\n"
        "sympy.sympify(\"open('graderpwned', 'w')\")"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "not evaluated" in done.stderr
    assert not list(tmp_path.iterdir())


def test_close_leaves_no_process() -> None:
    closing = Verifier(workers=2)
    closing.grade_batch([(output, gold) for output, gold, _ in cases()[:4]])
    pids = processes(closing)
    assert pids
    closing.close()
    closing.close()
    assert not any(exists(pid) for pid in pids)  # ended and reaped
    with pytest.raises(RuntimeError, match="closed"):
        closing.grade(r"\boxed{\sqrt{98}}", r"7\sqrt{2}")


def test_close_during_work_ends_it() -> None:
    closing = Verifier(workers=1)
    errors: list[str] = []

    def work() -> None:
        try:
            closing.grade(BUSY, "x+1")
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    assert wait_until(lambda: bool(processes(closing)))
    (pid,) = processes(closing)
    time.sleep(0.2)
    closing.close()
    thread.join(20)
    assert not thread.is_alive()
    assert "closed" in errors[0]
    assert not exists(pid)


def test_an_exception_in_the_caller_leaves_no_process() -> None:
    pids: list[int] = []

    def fail() -> None:
        with Verifier(workers=1) as small:
            small.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
            pids.extend(processes(small))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(pids) == 1
    assert not exists(pids[0])


IDLE = """
from dynamo_jax.tasks.grading.verifier import Verifier
grader = Verifier(workers=1)
grader.grade(r"\\boxed{\\sqrt{8}}", r"2\\sqrt{2}")
print(grader._pool.workers[0].process.pid, flush=True)
time.sleep(60)
"""
ASKED = """
from dynamo_jax.tasks.rewards import RewardGrader
grader = RewardGrader("waits:f", workers=1)
threading.Timer(0.5, print, [grader._pool.workers[0].process.pid], {"flush": True}).start()
grader.grade_batch([("", "")])
"""


@pytest.mark.parametrize("code", [IDLE, ASKED])
def test_workers_end_when_the_parent_is_killed(code: str, tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text("import time\ndef f(output, gold): time.sleep(1e6)\n")
    command = [sys.executable, "-c", f"import threading, time\n{code}"]  # finds modules in its folder
    with subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    stat = Path(f"/proc/{pid}/stat")  # where nobody reaps orphans, a dead one stays as Z
    assert wait_until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_the_users_main_module_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from dynamo_jax.tasks.grading import verifier\nprint('main')\n"
        "print(verifier.grade(r'\\boxed{\\sqrt{8}}', r'2\\sqrt{2}'))\n"
    )
    done = subprocess.run([sys.executable, str(script)], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["main", "True"]
    assert done.stderr == ""


def test_a_worker_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "latex2sympy2_extended.py").write_text("raise ImportError('broken install')")
    monkeypatch.setattr(module, "_PACKAGE_ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    with Verifier(workers=1) as broken:
        assert broken.grade(r"\boxed{3}", "3")
        with pytest.raises(RuntimeError, match=r"(?s)did not start.*broken install.*Remedy"):
            broken.grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
        assert processes(broken) == []


def test_limits_must_be_positive() -> None:
    for wrong in ({"workers": 0}, {"timeout": 0.0}, {"memory_mb": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            Verifier(**wrong)  # type: ignore[arg-type]


def test_grade() -> None:
    assert grade(r"\boxed{\frac{1}{2}}", "0.5")
    assert grade(r"\boxed{\sqrt{8}}", r"2\sqrt{2}")
    assert not grade(r"\boxed{1,2}", "(1,2)")


@pytest.mark.shared
def test_labelled_answers(shared: Path, verifier: Verifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in (shared / "grader" / "cases.jsonl").read_text().splitlines()]
    grades = verifier.grade_batch([(row["output"], row["gold"]) for row in rows])
    missed = [
        (r["category"], r["id"], r["policy"], g) for r, g in zip(rows, grades, strict=True) if g is not r["correct"]
    ]
    assert len(missed) <= 0.03 * len(rows), missed
    assert [m for m in missed if m[0] in ("hostile", "injection")] == []
    assert [m for m in missed if m[3] and not m[2]] == []  # no false accept but by policy
    assert not list(tmp_path.iterdir())
    assert not any((folder / "graderpwned").exists() for folder in (Path.home(), Path("/tmp"), shared.parent / "main"))
