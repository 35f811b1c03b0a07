"""What a step calls and what that costs: the counts against the programs themselves, the figures by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from dynamo_jax.config import load_config
from dynamo_jax.plan.chips import CHIPS
from dynamo_jax.plan.compiled import ProgramPlan
from dynamo_jax.plan.cost import Cost
from dynamo_jax.plan.estimate import ProgramEstimate, step_cost
from dynamo_jax.plan.jobs import planned_policy
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.plan.step import PROGRAMS, Work, multiplied_parameters, train_flops
from dynamo_jax.policy.hf import read_architecture
from dynamo_jax.policy.model import abstract_policy
from dynamo_jax.sharding import make_mesh
from dynamo_jax.update import Programs

ROOT = Path(__file__).resolve().parents[2]
ARITHMETIC = ROOT / "configs" / "arithmetic_cpu.yaml"
SIZES = [
    "rollout.prompts=8",
    "rollout.per_prompt=8",
    "rollout.max_tokens=64",
    "task.max_prompt_tokens=64",
]  # 64 rollouts
LENGTHS = Lengths(20, 16, 64, "")


def work(*overrides, lengths=LENGTHS):
    return Work(load_config(ARITHMETIC, ["warmup.steps=0", *SIZES, *overrides]), lengths)


def called(of: Work) -> dict[str, int]:
    """How often each program is called by a step that does as `Trainer.step`, with mini-batches that are as live."""
    config, calls = of.config, dict.fromkeys(("score", "terms", "update", "update (apply)"), 0)
    mesh = make_mesh(config.mesh)
    programs = Programs(*abstract_policy(planned_policy(config, mesh)[1]), config, mesh)

    def counted(name, returned):
        def program(*_):
            calls[name] += 1
            return returned

        return program

    programs.empty_program = lambda: None
    programs.score_program = counted("score", (None, None))
    programs.terms_program = counted("terms", (None, None, None))
    programs.gradient_program = counted("update", None)
    programs.apply_program = counted("update (apply)", (None, None))
    programs.whole_program = counted("update", (None, None))
    stats = SimpleNamespace(logp=None)
    rows = SimpleNamespace(rows=SimpleNamespace(sampled_logp=None))
    batches = [SimpleNamespace(live=live, batch=rows) for live in of.live]
    for batch in batches if programs.scores_first else []:
        programs.score(None, batch)
    for index, batch in enumerate(batches):
        programs.update(SimpleNamespace(params=None), batch, stats if programs.scores_first else None, first=not index)
    return calls


@pytest.mark.parametrize("old", ["score", "sampler"])
@pytest.mark.parametrize("modulated", ["true", "false"])
@pytest.mark.parametrize(("mini", "micro"), [(64, 64), (64, 8), (16, 16), (16, 4)])
def test_calls_are_those_that_the_programs_make(old, modulated, mini, micro):
    of = work(
        f"trainer.mini_batch={mini}", f"trainer.micro_batch={micro}", f"objective.old_logp={old}",
        f"modulation.enabled={modulated}",
    )  # fmt: skip
    expected = called(of)
    planned = {name: PROGRAMS[name].calls(of) for name in expected}
    if of.alone:
        planned |= {"terms": 0, "update (apply)": 0}  # programs that such a run does not have
    assert planned == expected
    assert len(of.live) == 64 // mini


def test_the_reference_passes_over_every_live_micro_batch():
    of = work("trainer.mini_batch=32", "trainer.micro_batch=8", "objective.kl.coefficient=0.1")
    assert PROGRAMS["score (reference)"].calls(of) == sum(of.live) > 0
    assert PROGRAMS["score (reference)"].calls(work()) == 0


def test_rows_are_packed():
    """64 rollouts of 20 + 64 tokens, one to a row of 128; of 20 + 12, four: one micro-batch is not full."""
    whole = work("trainer.mini_batch=32", "trainer.micro_batch=8", lengths=Lengths(20, 64, 64, ""))
    assert whole.live == [4, 4]
    assert whole.padding == pytest.approx(1 - 84 / 128)
    short = work("trainer.mini_batch=32", "trainer.micro_batch=8", lengths=Lengths(20, 12, 12, ""))
    assert short.live == [1, 1]
    assert short.padding == 0


def test_a_reference_reads_every_live_micro_batch_once():
    sizes = ["trainer.mini_batch=32", "trainer.micro_batch=8"]
    with_reference = work(*sizes, "objective.kl.coefficient=0.01")
    assert PROGRAMS["score (reference)"].calls(with_reference) == sum(with_reference.live)
    assert PROGRAMS["score (reference)"].calls(work(*sizes)) == 0


def test_pieces_decode_until_their_longest_ends():
    of = work("rollout.batch=16")
    assert of.pieces == 4
    assert of.decoded == LENGTHS.longest(16) - 1
    assert work().decoded > of.decoded
    assert PROGRAMS["sample"].ends(of) == {"generate": of.decoded}


def test_parameters_that_are_multiplied_with():
    """Of the tied policy all; of the other all but the embedding, which is looked up."""
    for tied in ("true", "false"):
        of = work(f"policy.architecture.tie_word_embeddings={tied}")
        decoder = planned_policy(of.config, make_mesh(of.config.mesh))[1]
        count = sum(x.size for x in jax.tree.leaves(abstract_policy(decoder)[1]))
        looked_up = 0 if tied == "true" else decoder.shape.vocab_size * decoder.shape.hidden_size
        assert multiplied_parameters(decoder.shape) == count - looked_up


def test_the_flops_of_the_recipe(tmp_path):
    """512 rollouts of 4,096 tokens by Qwen2.5-Math-1.5B: 1.54e9 parameters, 6.15 s on 16 chips of v5e at their peak
    without attention, which adds 6 * 28 * 12 * 128 * 4096 FLOPs a token."""
    text = {"model_type": "qwen2", "num_hidden_layers": 28, "rms_norm_eps": 1e-6, "rope_theta": 10000}
    text |= {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
    (tmp_path / "config.json").write_text(json.dumps(text | {"vocab_size": 151936, "tie_word_embeddings": True}))
    config = load_config(ROOT / "configs" / "qwen2.5_math_1.5b.yaml", ["rollout.prompts=32", "rollout.batch=512"])
    flops = train_flops(read_architecture(tmp_path), Work(config, Lengths(1024, 3072, 3072, "")))
    attention = 512 * 4096 * 6 * 28 * 12 * 128 * 4096
    assert (flops - attention) / (16 * 197e12) == pytest.approx(6.15, abs=0.02)


def test_a_step_is_the_sum_of_its_calls():
    of = work("trainer.mini_batch=32", "trainer.micro_batch=8", lengths=Lengths(20, 64, 64, ""))  # 8 live, 2 updates
    seconds = {"allocate": 1.0, "sample": 50.0, "score": 2.0, "terms": 1.0, "update": 6.0, "update (apply)": 3.0}
    programs = []
    for name, each in seconds.items():
        cost = Cost(seconds=each, fastest_links=each * 2, link_seconds=each)
        use = PROGRAMS[name]
        plan = ProgramPlan(name, 0, 0.0, text="")
        programs.append(ProgramEstimate(plan, use.phase, use.calls(of), cost, cost))
    chip, devices = CHIPS["TPU v4"], jax.devices()[:4]
    step = step_cost(of.config, devices, chip, of.lengths, programs)
    assert step.phases == {"sample": 50, "score": 2 * 12, "update": 2 * 1 + 8 * 6 + 2 * 3, "allocate": 1}
    assert step.seconds == 50 + 24 + 56 + 1
    assert (step.low, step.high) == (2 * step.seconds, 2 * step.seconds)
    assert step.tokens == 64 * 84
    assert step.chips == 2  # of two devices each
    assert step.tokens_per_chip == step.tokens / 131 / 2
    assert step.dollars(3.0) == 3.0 * 2 * 131 / 3600
    assert step.update_mfu == step.model_flops / (56 * 4 * 137.5e12)
    assert step.mfu == pytest.approx(step.model_flops * 4 / 3 / (80 * 4 * 137.5e12))
    assert step_cost(of.config, devices, chip, of.lengths, [ProgramEstimate(programs[0].plan, "sample", 1)]) is None
