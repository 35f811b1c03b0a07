"""From settings to what each token brings: the modulated advantage by hand, however the tokens lie in rows."""

import numpy as np
import pytest
from packed_rows import Flat, in_rows, of_rollouts, packed, tokens_in

from dynamo_jax.batch import TokenStats
from dynamo_jax.config import Config, ModulationConfig, ObjectiveConfig
from dynamo_jax.objective.terms import token_advantages
from dynamo_jax.update.packing import Shape

M, L, C = 8, 4, 6
SHAPES = [Shape(1, M, L + C), Shape(4, 2, L + C), Shape(2, 4, 23)]
CONFIG = Config(
    run_dir="unused", modulation=ModulationConfig(gamma=5.0, tau=0.5), objective=ObjectiveConfig(clip_ratio_c=3.0)
)


def given() -> tuple[Flat, TokenStats, TokenStats]:
    """Rollouts, and what the old and the current policy say of their tokens."""
    rng = np.random.default_rng(1)
    flat = Flat(
        prompts_ML=rng.integers(0, 9, (M, L)).astype(np.int32),
        prompt_length_M=np.array([4, 1, 2, 3, 4, 1, 2, 3], np.int32),
        tokens_MC=rng.integers(0, 9, (M, C)).astype(np.int32),
        length_M=np.array([6, 1, 3, 1, 5, 2, 6, 4], np.int32),
        advantage_M=np.array([1.0, -0.5, 0.7, -1.2, 0.0, 2.0, -0.1, 0.4], np.float32),
        weight_M=np.ones(M, np.float32),
        random_M=np.arange(M, dtype=np.uint32),
        sampled_logp_MC=np.zeros((M, C), np.float32),
    )
    now = TokenStats(-rng.exponential(1, (M, C)), rng.exponential(1, (M, C)), rng.uniform(0, 0.1, (M, C)))
    old = now._replace(logp=now.logp + rng.normal(0, 0.3, (M, C)))
    return flat, *(TokenStats(*(np.float32(x) for x in stats)) for stats in (old, now))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulation_by_hand(shape: Shape) -> None:
    """The factors of every token from their equations in float64; extremes over the tokens of the whole mini-batch."""
    flat, old, now = given()
    mini = packed(flat, shape)
    there = TokenStats(*(in_rows(mini, x) for x in now))
    found, metrics = token_advantages(tokens_in(mini), in_rows(mini, old.logp), there, M, CONFIG)

    mask, m = flat.mask_MC, CONFIG.modulation
    A = flat.advantage_M[:, None].astype(np.float64) * mask
    logp, H, lam = (np.asarray(x, np.float64) for x in now)
    ratio = np.exp(logp - old.logp)
    free = ((A > 0) & (ratio <= 1.2)) | ((A < 0) & (ratio >= 0.8) & (ratio <= 3.0))
    xi = np.abs(free * ratio * A * (np.exp(logp) * (logp + H) - lam))
    comp = np.where(A > 0, 1 + m.alpha * (H[mask].max() - H) / (H[mask].max() - H[mask].min()), 1.0)
    stab = m.lambda_min + (1 - m.lambda_min) / (1 + np.exp(m.gamma * (xi / xi.max() - m.tau)))
    np.testing.assert_allclose(of_rollouts(mini, found, C), A * comp * stab, atol=1e-5)
    assert float(metrics["modulation/comp_mean"]) == pytest.approx(comp[mask].mean(), abs=1e-5)
    assert float(metrics["modulation/stab_min"]) == pytest.approx(stab[mask].min(), abs=1e-5)


def test_without_modulation_a_token_has_its_rollouts_advantage() -> None:
    flat, old, now = given()
    mini = packed(flat, SHAPES[1])
    off = Config(run_dir="unused", modulation=ModulationConfig(enabled=False))
    there = TokenStats(*(in_rows(mini, x) for x in now))
    found, metrics = token_advantages(tokens_in(mini), in_rows(mini, old.logp), there, M, off)
    np.testing.assert_array_equal(of_rollouts(mini, found, C), flat.advantage_M[:, None] * flat.mask_MC)
    assert not np.any(np.asarray(found)[tokens_in(mini).mask == 0])
    assert metrics == {}
