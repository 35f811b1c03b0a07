"""The report: one self-contained page, whatever the run folders hold, and errors that name the file and the remedy."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from dynamo_jax.config import Config, resolved
from dynamo_jax.report import write_report
from dynamo_jax.report.charts import sections
from dynamo_jax.report.plots import MAX_POINTS, smooth, thin
from dynamo_jax.report.runs import load_runs
from dynamo_jax.report.tables import NONE, leftovers, samples, scores, settings, summary

HOSTILE = "</pre><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>"
VOID = {"meta", "path", "use", "rect"}


class Page(HTMLParser):
    """Collects elements and fails at the first tag that does not close what was opened."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def held_out(step: int, steps: int) -> dict:
    line = {}
    for k, start in ((1, 0.36), (8, 0.53)):
        value = start + 0.3 * step / steps
        line |= {f"eval/heldout/pass@{k}": value, f"eval/heldout/pass@{k}_low": value - 0.03}
        line[f"eval/heldout/pass@{k}_high"] = value + 0.03
    return line


def metrics(steps: int, rng: np.random.Generator) -> list[dict]:
    lines = [{"step": 0, **held_out(0, steps)}]
    for step in range(1, steps + 1):
        noise = rng.random(8).tolist()
        line = {
            "step": step, "reward/mean": 0.4 + 0.1 * noise[0], "allocation/min": 2, "allocation/max": 20,
            "allocation/entropy": 4.0, "allocation/mean_easy": 5.0, "allocation/mean_middle": 12.0 + noise[1],
            "allocation/mean_hard": 7.0, "allocation/prompts_easy": 20, "allocation/prompts_middle": 30,
            "allocation/prompts_hard": 14, "objective/loss": noise[2], "objective/entropy": noise[3],
            "objective/clip_fraction": 0.01, "objective/dual_clip_fraction": 0.0, "objective/kl_old_new": 1e-5,
            "objective/grad_norm": 10.0 ** (4 * noise[4]), "objective/skipped_updates": 0,
            "modulation/comp_mean": 1.1, "modulation/comp_max": 1.2, "modulation/stab_mean": 0.98,
            "modulation/stab_min": 0.6, "rollout/tokens_per_second": 9000.0, "rollout/length_mean": 5 + noise[5],
            "rollout/length_max": 8, "rollout/truncated_fraction": 0.01, "rollout/logp_drift": 1e-6 * noise[6],
            "time/sample": 0.2, "time/update": 0.3, "time/step": 0.6 + noise[7],
        }  # fmt: skip
        lines.append(line | (held_out(step, steps) if step % 10 == 0 or step == steps else {}))
    return lines


def sample(step: int, i: int, **changes) -> dict:
    return {
        "step": step, "prompt_id": f"p{i}", "prompt": f"{i}+1=", "text": str(i + 1), "answer": str(i + 1),
        "reward": float(i % 2), "length": 2, "ended": True, **changes,
    }  # fmt: skip


def make_run(folder: Path, lines: list[dict] | None = None, rollouts: list[dict] | None = None, **config) -> Path:
    (folder / "rollouts").mkdir(parents=True)
    tree = resolved(Config(run_dir=str(folder))) | config
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = metrics(30, np.random.default_rng(0)) if lines is None else lines
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (1, 30):
        rows = [sample(step, i) for i in range(6)] if rollouts is None else rollouts
        (folder / f"rollouts/step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def report(*runs: Path) -> tuple[str, Page]:
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_is_well_formed_and_needs_nothing_else(tmp_path):
    text, page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1))
    assert text.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert not re.search(r"https?:|//|@import|@font-face|url\((?!#)", text)
    assert all(v.startswith("#") for _, name, v in page.attributes if name in ("href", "xlink:href", "src"))
    ids = [v for _, name, v in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {v[1:] for _, name, v in page.attributes if name == "href"} | set(re.findall(r"url\(#([^)]*)\)", text))
    assert targets <= set(ids)
    assert str(tmp_path) not in text


def test_charts_and_tables_can_be_read_without_seeing_them(tmp_path):
    _, page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    charts = [v for tag, name, v in page.attributes if tag == "svg" and name == "aria-label"]
    assert page.attributes.count(("svg", "role", "img")) == len(charts) > 15
    assert any("Pass@1: heldout. a: 0.36 at step 0, 0.66 at step 30" in label for label in charts)
    assert page.tags.count("th") == sum(1 for tag, name, _ in page.attributes if (tag, name) == ("th", "scope"))
    assert page.tags.count("figure") == page.tags.count("figcaption")


def test_model_output_is_escaped_everywhere(tmp_path):
    name = "<script>run"
    rows = [sample(1, i, text=HOSTILE + "\x00\x1b[31m\u202e\ud800", prompt=HOSTILE, prompt_id=HOSTILE, answer=HOSTILE)
            for i in (0, 1)]  # fmt: skip
    lines = [{"step": 0, "eval/<script>bench/pass@1": 0.5, "<script>other": "<script>", "time/<script>": 1.0}]
    lines += [{"step": 1, "time/<script>": 1.0}]
    config = {"task": {"<script>": HOSTILE}}
    text, page = report(
        make_run(tmp_path / name, lines, rows, **config), make_run(tmp_path / "$x_$", lines, rows, **config)
    )
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text
    assert "<script" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)


def test_two_runs_are_named_and_their_differences_come_first(tmp_path):
    a = make_run(tmp_path / "x" / "run", allocation={"rule": "bernoulli", "low": 2})
    b = make_run(tmp_path / "y" / "run", allocation={"rule": "uniform"})
    runs = load_runs([a, b])
    assert [run.name for run in runs] == ["x/run", "y/run"]
    rows = settings(runs)
    assert [(row.key, row.values) for row in rows if row.differs] == [
        ("allocation.low", ["2", NONE]), ("allocation.rule", ["bernoulli", "uniform"])
    ]  # fmt: skip
    assert [row.differs for row in rows] == sorted((row.differs for row in rows), reverse=True)
    _, page = report(a, b)
    assert page.attributes.count(("tr", "class", "differs")) == 2
    assert [run.name for run in load_runs([a, a])] == ["run (1)", "run (2)"]


def test_summary_and_scores(tmp_path):
    lines = [
        {"step": 0, "eval/h/pass@1": 0.3, "eval/h/pass@1_low": 0.25, "eval/h/pass@1_high": 0.35},
        {"step": 1, "time/sample": 1.0, "time/update": 2.0, "time/step": 3.5, "rollout/tokens_per_second": 10.0},
        {"step": 2, "time/sample": 60.0, "time/update": 2.0, "eval/h/pass@1": 0.6, "objective/skipped_updates": 1},
        {"step": 3, "time/step": 3.5, "eval/h/pass@1": 0.5, "my/metric": 7, "objective/skipped_updates": 1},
    ]
    runs = load_runs([make_run(tmp_path / "a", lines)])
    [(name, [score])] = scores(runs)
    assert (name, score.first, score.last) == ("h, Pass@1", "0.300 [0.250, 0.350] at step 0", "0.500 at step 3")
    assert (score.best, score.change) == ("0.600 at step 2", "+0.200")
    table = {key: value for key, [value] in summary(runs)}
    assert table["Steps done"] == "3 of 150"
    assert table["Time, sum of all steps"] == "1 min 09 s"
    assert table["Sampling speed, median"] == "10 tokens/s"
    assert table["Updates skipped (not finite)"] == "2"
    assert table["Allocation"] == "bernoulli, 64 prompts x 8, n in [2, 24]"
    assert leftovers(runs) == [("my/metric", ["7"])]


@pytest.mark.parametrize(
    ("tied", "vocab", "expected"), [(True, 1000, "18.1k"), (False, 1000, "34.1k"), (True, None, "2.1k")]
)
def test_parameters_are_counted_from_the_architecture(tmp_path, tied, vocab, expected):
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": None,
             "intermediate_size": 26, "vocab_size": vocab, "qkv_bias": True, "tie_word_embeddings": tied}  # fmt: skip
    runs = load_runs([make_run(tmp_path / "a", [{"step": 0}], policy={"architecture": shape})])
    # q, o: 256 each; k, v: 128 each; bias 32; three of 16 x 26; norms 2 x 16 and 16
    assert 2 * 256 + 2 * 128 + 32 + 3 * 16 * 26 + 3 * 16 == 2096
    words = dict(summary(runs))["Policy"][0]
    assert words.startswith(f"random initial weights, {expected} parameters")
    assert words.endswith("besides embeddings") == (vocab is None)


def test_missing_and_null_metrics_are_said_not_drawn(tmp_path):
    lines = [{"step": 0}, {"step": 1, "reward/mean": None, "objective/entropy": float("nan"), "unknown": [1]}]
    _, page = report(make_run(tmp_path / "a", lines, []))
    assert "path" not in [tag for tag, name, _ in page.attributes if name == "d" and tag == "svg"]
    assert page.attributes.count(("p", "class", "empty")) == page.tags.count("figure") > 10
    assert "No data: no finite value of reward/mean was logged." in page.text


def test_the_learning_curve_weighs_every_prompt_alike(tmp_path):
    old = [{"step": step, "reward/mean": step / 8} for step in range(1, 4)]
    new = [line | {"reward/prompt_mean": line["reward/mean"] + 0.5} for line in old]
    resumed = [*old[:2], new[2]]  # one line of one kind, also where there is the newer metric at the end
    folders = [make_run(tmp_path / name, lines) for name, lines in zip("abc", (new, old, resumed), strict=True)]
    runs = load_runs(folders)
    [chart] = [c for s in sections(runs) for c in s.charts if c.title == "Training reward"]
    ends = ("a: 0.625 at step 1, 0.875 at step 3", "b: 0.125 at step 1, 0.375 at step 3")
    assert chart.panels[0].alt == "; ".join((*ends, ends[1].replace("b:", "c:")))
    assert [key.label for key in chart.legend] == ["a", "b", "c"]
    assert re.findall(r"(\w) shows reward/mean", chart.caption) == ["b", "c"]
    # What is drawn is not among the metrics that nothing shows; what it replaced is.
    assert [[key for key, _ in leftovers([run])] for run in runs] == [["reward/mean"], [], []]


def test_a_step_without_one_mean_is_left_out_of_the_shares(tmp_path):
    lines = metrics(4, np.random.default_rng(0))
    lines[1]["allocation/mean_hard"] = None  # had 14 prompts: a share of 0 would be wrong
    lines[4] |= {"allocation/mean_hard": None, "allocation/prompts_hard": 0}  # had none: 0 is right
    [chart] = [
        c for s in sections(load_runs([make_run(tmp_path / "a", lines)])) for c in s.charts if "Share" in c.title
    ]
    assert re.search(r"hard: 1\d\.\d% at step 2, 0% at step 4", chart.panels[0].alt)


@pytest.mark.parametrize("others", [0, 1])
def test_a_run_that_was_just_started(tmp_path, others):
    runs = [make_run(tmp_path / "new", [], [])] + [make_run(tmp_path / "old") for _ in range(others)]
    _, page = report(*runs)
    assert "new has no metrics yet" in page.text
    assert ("figure" in page.tags) == bool(others)
    assert "allocation.rule" in page.text


def test_only_the_score_before_training(tmp_path):
    _, page = report(make_run(tmp_path / "a", [{"step": 0, "eval/h/pass@1": 0.4}], []))
    assert "0.400 at step 0" in page.text


@pytest.mark.parametrize("tail", [b'{"step": 31, "rew', b'{"text": "\xe2\x82', b"\x00\x00\x00"])
def test_the_partial_last_line_of_a_killed_run_is_skipped(tmp_path, tail):
    run = make_run(tmp_path / "a")
    for file in (run / "metrics.jsonl", run / "rollouts/step_000030.jsonl"):
        file.write_bytes(file.read_bytes() + tail)
    [loaded] = load_runs([run])
    assert loaded.steps == 30
    assert [len(rows) for rows in loaded.samples] == [6, 6]


def test_scores_on_a_line_of_their_own_join_their_step(tmp_path):
    lines = [{"step": 1, "reward/mean": 0.5}, {"step": 1, "eval/h/pass@1": 0.4}]
    [run] = load_runs([make_run(tmp_path / "a", lines)])
    assert run.rows == [{"step": 1, "reward/mean": 0.5, "eval/h/pass@1": 0.4}]


def test_samples_are_right_or_wrong_by_the_verdict_and_not_by_the_reward(tmp_path):
    """A penalty for length takes a right answer below a half, a bonus for form lifts a wrong one above it."""
    rows = [
        sample(1, 0, text="short of it", right=True, reward=0.3),
        sample(1, 1, text="well formed", right=False, reward=0.7),
        sample(1, 2, text="plainly right", right=True, reward=1.0),
    ]
    [found, _] = samples(load_runs([make_run(tmp_path / "a", rollouts=rows)]))
    assert [row["text"] for row in found.right] == ["short of it", "plainly right"]
    assert [row["text"] for row in found.wrong] == ["well formed"]
    assert found.counts == "2 right, 1 wrong of 3 saved"
    # Lines of older runs have no verdict; two that are alike are two.
    older = [{k: v for k, v in row.items() if k != "right"} for row in rows]
    [found, _] = samples(load_runs([make_run(tmp_path / "b", rollouts=[older[0], older[0], older[2], rows[1]])]))
    assert [row["text"] for row in found.right] == ["plainly right"]
    assert found.counts.startswith("1 right, 3 wrong of 4 saved; without a saved verdict, a reward above 0.5 counts")


def test_same_input_same_bytes_in_any_process(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    text, _ = report(a, b)
    code = "import sys; from pathlib import Path; from dynamo_jax.report import write_report\n"
    code += "write_report([Path(p) for p in sys.argv[2:]], Path(sys.argv[1]))\n"
    code += "sys.exit(any(name in sys.modules for name in ('jax', 'matplotlib.pyplot')))"
    out = tmp_path / "other.html"
    subprocess.run([sys.executable, "-c", code, out, a, b], check=True, env={"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"})
    assert out.read_text(encoding="utf-8") == text


def test_long_runs_make_small_files(tmp_path):
    runs = [make_run(tmp_path / name, metrics(2000, np.random.default_rng(i))) for i, name in enumerate("ab")]
    text, _ = report(*runs)
    assert len(text) < 1_500_000
    assert max(path.count("L") for path in re.findall(r' d="([^"]*)"', text)) <= 500


def test_thinning_keeps_spikes_and_ends():
    x = np.arange(5000.0)
    y = np.sin(x / 500)
    y[1234], y[4321] = 50.0, -50.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MAX_POINTS + 2
    assert (thin_y.max(), thin_y.min(), thin_x[0], thin_x[-1]) == (50.0, -50.0, 0.0, 4999.0)
    assert (np.diff(thin_x) > 0).all()


def test_smoothing_is_a_mean_of_what_is_there():
    np.testing.assert_allclose(smooth(np.array([3.0, 0.0, 3.0, 6.0]), 3), [1.5, 2.0, 3.0, 4.5])
    np.testing.assert_allclose(smooth(np.ones(4), 9), np.ones(4))


def test_errors_name_the_file_the_line_and_the_remedy(tmp_path):
    def refused(run: Path, pattern: str) -> None:
        out = tmp_path / "kept.html"
        out.write_text("an older report")
        with pytest.raises(ValueError, match=pattern):
            write_report([run], out)
        assert out.read_text() == "an older report"

    refused(tmp_path / "none", r"none: no such run folder\. Give")
    run = make_run(tmp_path / "no-metrics")
    (run / "metrics.jsonl").unlink()
    refused(run, r"metrics\.jsonl: no such file\. Give a run folder")
    run = make_run(tmp_path / "no-config")
    (run / "config.yaml").unlink()
    refused(run, r"config\.yaml: no such file\. Copy back")
    (run / "config.yaml").write_text("a: [1")
    refused(run, r"config\.yaml: not valid YAML: .*Copy back")
    (run / "config.yaml").write_text("- 1")
    refused(run, r"config\.yaml: is not a mapping")
    run = make_run(tmp_path / "broken")
    for line, pattern in (
        ('{"step": 1, ', r"metrics\.jsonl:2: broken JSON: .*Correct or remove"),
        ("[1]", r"metrics\.jsonl:2: is not a JSON object"),
        ('{"step": "1"}', r"metrics\.jsonl:2: `step` is '1'"),
        ('{"reward/mean": 1}', r"metrics\.jsonl:2: `step` is None"),
    ):
        (run / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
        refused(run, pattern)
    run = make_run(tmp_path / "broken-rollouts")
    (run / "rollouts/step_000001.jsonl").write_text("{\n{}\n")
    refused(run, r"step_000001\.jsonl:1: broken JSON")
    with pytest.raises(ValueError, match="no run folder is given"):
        write_report([], tmp_path / "kept.html")


@pytest.mark.parametrize("out", ["no/such/folder.html", "a"])
def test_an_output_that_cannot_be_written(tmp_path, out):
    run = make_run(tmp_path / "a", [{"step": 0}])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=rf"{out}: cannot be written: .*Give --out"):
        write_report([run], tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before
