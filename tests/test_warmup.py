"""The supervised warm-up: it learns, is deterministic, does not see the mesh, and leaves held-out problems out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dynamo_jax import warmup as module
from dynamo_jax.config import ArchitectureConfig, ArithmeticConfig, Config, PolicyConfig, RolloutConfig, TaskConfig
from dynamo_jax.config.tree import WarmupConfig
from dynamo_jax.policy import DecoderConfig, abstract_policy, init_policy
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.tasks.arithmetic import ArithmeticTokenizer, solve, split_problems
from dynamo_jax.update.gradient import row_stats
from dynamo_jax.warmup import warm_up

STEPS, BATCH, HELDOUT = 12, 64, 60
CONFIG = Config(
    run_dir="unused",
    task=TaskConfig(max_prompt_tokens=6, arithmetic=ArithmeticConfig(max_operations=1)),
    warmup=WarmupConfig(steps=STEPS, batch=BATCH, learning_rate=1e-2),
    policy=PolicyConfig(
        architecture=ArchitectureConfig(
            hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16
        )
    ),
    rollout=RolloutConfig(max_tokens=4),
)  # fmt: skip
KEY = jax.random.key(3)


def policy() -> DecoderConfig:
    return decoder_config(CONFIG, ArithmeticTokenizer().size, None)


def heldout() -> list[str]:
    """60 of the 243 problems of one operation."""
    return split_problems(0, HELDOUT, HELDOUT, max_operations=1)[1]


@dataclasses.dataclass
class Seen:
    params: Any
    problems: list[str]
    batches: list[Any]
    steps: list[int]


def watched(
    each_step: Callable[[int], None] = lambda _: None, config: Config = CONFIG, decoder: DecoderConfig | None = None
) -> Seen:
    """A warm-up and all that it learned from."""
    seen = Seen(None, [], [], [])
    with pytest.MonkeyPatch.context() as context:

        def keep(pairs: list[tuple[str, str]], *arguments: Any) -> Any:
            assert all(solution == solve(problem) for problem, solution in pairs)
            seen.problems += [problem for problem, _ in pairs]
            seen.batches.append(supervised_rows(pairs, *arguments))
            return seen.batches[-1]

        supervised_rows = module._supervised_rows
        context.setattr(module, "_supervised_rows", keep)

        def tell(done: int) -> None:
            seen.steps.append(done)
            each_step(done)

        seen.params = warm_up(decoder or policy(), config, heldout(), KEY, tell)
    return seen


@pytest.fixture(scope="module")
def seen() -> Seen:
    return watched()


def loss(params: Any, batch: Any) -> float:
    model, (rows, tokens) = nnx.merge(abstract_policy(policy())[0], params), batch
    tables = model.tables()
    stats = row_stats(model, model.embedded(rows.tokens, tables.embedding), tables.head, rows, tokens.mask, 1.0)
    return float(-jnp.sum(stats.logp * tokens.mask) / jnp.sum(tokens.mask))


def test_it_learns_from_as_many_batches_as_asked(seen: Seen) -> None:
    assert seen.steps == list(range(1, STEPS + 1))
    assert len(seen.problems) == STEPS * BATCH
    start = loss(init_policy(policy(), KEY), seen.batches[0])
    assert loss(jax.tree.map(jnp.asarray, seen.params), seen.batches[0]) < start - 0.5


def test_heldout_problems_are_never_seen(seen: Seen) -> None:
    """768 draws from 243 problems: without the exclusion all of the held-out ones would have been expected."""
    assert not set(seen.problems) & set(heldout())
    assert len(set(seen.problems)) > 100


def test_batches_are_problems_and_solutions_with_an_end(seen: Seen) -> None:
    """One after the other in a row; what is learned of a row is the solution and where it ends."""
    tokenizer, (rows, tokens) = ArithmeticTokenizer(), seen.batches[0]
    for g, problem in enumerate(seen.problems[:BATCH]):
        prompt, completion = tokenizer.encode(problem), [*tokenizer.encode(solve(problem)), tokenizer.eos_id]
        L, C, end = CONFIG.task.max_prompt_tokens, CONFIG.rollout.max_tokens, len(prompt) + len(completion)
        np.testing.assert_array_equal(rows.tokens[g], prompt + completion + [tokenizer.pad_id] * (L + C - end))
        np.testing.assert_array_equal(rows.rollout[g], [g] * end + [BATCH] * (L + C - end))
        np.testing.assert_array_equal(rows.position[g, :end], np.arange(end))
        learned = np.roll(rows.tokens[g], -1)[tokens.mask[g] > 0]
        np.testing.assert_array_equal(learned, completion)


def test_same_seed_same_policy_and_another_seed_another(seen: Seen) -> None:
    again = watched()
    jax.tree.map(np.testing.assert_array_equal, again.params, seen.params)
    assert again.problems == seen.problems
    other = watched(config=dataclasses.replace(CONFIG, seed=1, warmup=dataclasses.replace(CONFIG.warmup, steps=1)))
    assert other.problems != seen.problems[:BATCH]


def test_small_steps_of_a_bfloat16_policy_add_up() -> None:
    """Each step is a fraction of most parameters' last digit; all of them together move it as far as in float32."""
    config = dataclasses.replace(CONFIG, warmup=dataclasses.replace(CONFIG.warmup, learning_rate=3e-4))
    half = dataclasses.replace(policy(), param_dtype="bfloat16")
    moved = []
    for decoder in (policy(), half):
        start = init_policy(decoder, KEY)["blocks"]
        end = watched(config=config, decoder=decoder).params["blocks"]
        assert {x.dtype for x in jax.tree.leaves(end)} == {jnp.dtype(decoder.param_dtype)}
        shifts = jax.tree.map(lambda a, b: np.abs(np.float32(a) - np.float32(b)).mean(), end, start)
        moved.append(np.mean(jax.tree.leaves(shifts)))
    assert moved[1] == pytest.approx(moved[0], rel=0.2)


def test_result_is_on_the_host_and_the_work_on_one_device(seen: Seen) -> None:
    """That the trainer's policy after warm-up is the same on every mesh is in `test_trainer.py`."""
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(seen.params))
    others, devices = jax.live_arrays(), set()

    def look(_: int) -> None:
        known = {id(x) for x in others}
        devices.update(d for x in jax.live_arrays() if id(x) not in known for d in x.devices())

    watched(look, dataclasses.replace(CONFIG, warmup=dataclasses.replace(CONFIG.warmup, steps=1)))
    assert len(devices) == 1


def test_it_can_be_stopped_at_every_step() -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        watched(stop)
