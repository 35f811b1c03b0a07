"""Real text through the whole loop: GSM8K, Qwen2.5-Math's tokenizer, mathematical grading, `eval` and `export`.

The policy is random, so nothing is right: what is tested is that every part fits its neighbours.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flax import nnx

from dynamo_jax import cli
from dynamo_jax.config import load_config
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.export import load_policy
from dynamo_jax.policy.model import abstract_policy
from dynamo_jax.run.metrics import read_metrics
from dynamo_jax.tasks.tokenizer import load_tokenizer

pytestmark = pytest.mark.shared

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "gsm8k_tiny_cpu.yaml"
VOCAB = 151936


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    # Not `splitlines`, which would also divide at the line separators that real text holds.
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


@pytest.fixture(scope="module")
def run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe's five steps, as its comment says."""
    folder = tmp_path_factory.mktemp("real") / "run"
    files = [f"task.train=[{shared}/data/gsm8k_train.jsonl]", f"task.tokenizer={shared}/data/qwen2.5-math-1.5b"]
    quiet = ["logging.tensorboard=false", "logging.progress=false"]
    # In a process of its own, optimized as a user's is: a vocabulary of 151936 is slow without.
    command = [sys.executable, "-m", "dynamo_jax", "train", str(RECIPE), *files, *quiet, f"run_dir={folder}"]
    subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": ""})
    return folder


def test_the_recipe_alone_says_what_to_give_it(capsys):
    assert cli.main(["train", str(RECIPE)]) == 2
    message = capsys.readouterr().err
    assert f"{RECIPE}: task.train = []" in message
    assert "Give a path" in message


def test_five_steps(run):
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    for row in rows[1:]:
        # A fresh policy is nearly uniform over the whole vocabulary: log V is 11.93 nats.
        assert math.log(VOCAB) - 1 < row["objective/entropy"] < math.log(VOCAB)
        assert row["rollout/logp_drift"] < 1e-4
        assert row["objective/skipped_updates"] == 0
        assert row["reward/mean"] == 0
        assert 2 <= row["allocation/min"] <= 4 <= row["allocation/max"] <= 8
    assert (run / "report.html").stat().st_size > 10_000


def test_the_samples_are_chats_with_answers_of_their_own_prompts(run, shared):
    data = {row["id"]: row for row in read_jsonl(shared / "data" / "gsm8k_train.jsonl")}
    files = sorted((run / "rollouts").iterdir())
    assert len(files) == 5
    for file in files:
        rows = read_jsonl(file)
        assert len(rows) == 16
        assert len({row["prompt_id"] for row in rows}) == 4
        for row in rows:
            source = data[row["prompt_id"]]
            assert row["answer"] == source["answer"]
            assert row["prompt"].startswith("<|im_start|>system\nPlease reason step by step")
            assert f"<|im_start|>user\n{source['problem']}<|im_end|>\n<|im_start|>assistant\n" in row["prompt"]
            assert row["ended"] or row["length"] == 32
            assert "<|im_end|>" not in row["text"]


def test_eval_prints_its_table(run, shared, tmp_path, capsys):
    bench = shared / "data" / "bench" / "aime24.jsonl"
    words = ["eval", run / "config.yaml", "--checkpoint", run, "--benchmark", bench, "--samples", "2", "--k", "1", "2"]
    assert cli.main([str(word) for word in [*words, "--json", tmp_path / "scores.json"]]) == 0
    lines = capsys.readouterr().out.splitlines()
    # One of the thirty problems is longer than the recipe's 256 tokens.
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:5] == ["aime24", "30", "2", "0.0 (0.0 to 0.0)", "0.0 (0.0 to 0.0)"]
    assert cells[-1] == "1"
    assert lines[4].startswith("aime24: 1 of 30 problems are longer than task.max_prompt_tokens = 256")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["metrics"]["eval/aime24/pass@2"] == 0
    assert len(scores["correct"]["aime24"]) == 30
    assert len(scores["dropped"]["aime24"]) == 1


def test_transformers_loads_the_export_and_computes_the_same(run, shared, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "exported"
    assert cli.main(["export", str(run / "config.yaml"), "--checkpoint", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"

    prompt = read_jsonl(run / "rollouts" / "step_000005.jsonl")[0]["prompt"]
    theirs = AutoTokenizer.from_pretrained(out, local_files_only=True)
    ids = load_tokenizer(shared / "data" / "qwen2.5-math-1.5b").encode(prompt)
    assert theirs.encode(prompt, add_special_tokens=False) == ids

    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert model.config.vocab_size == VOCAB
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()

    config = load_config(run / "config.yaml")
    decoder = decoder_config(config, VOCAB, None)
    policy = nnx.merge(abstract_policy(decoder)[0], load_policy(run, decoder))
    hidden = policy(np.array([ids], np.int32), np.ones((1, len(ids)), bool))
    np.testing.assert_allclose(np.asarray(policy.logits(hidden[0])), expected, atol=1e-4)


def test_the_run_folder_keeps_the_paths_that_it_was_given(run, shared):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["task"]["train"] == [f"{shared}/data/gsm8k_train.jsonl"]
    assert config["task"]["tokenizer"] == f"{shared}/data/qwen2.5-math-1.5b"
