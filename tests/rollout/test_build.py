"""From a config to the samplers of training and of evaluation."""

import dataclasses
from typing import Any

import jax
import pytest

from dynamo_jax.config import Config, EvalConfig, MeshConfig
from dynamo_jax.rollout.build import make_samplers
from dynamo_jax.sharding import make_mesh


class Special:
    stop_ids = (1, 2)
    pad_id = 0


def samplers(**evaluation: Any) -> tuple[Any, Any]:
    """Of a graph that is not there: nothing is traced before a call."""
    config = dataclasses.replace(Config(run_dir="r"), eval=EvalConfig(**evaluation))
    return make_samplers(None, config, Special(), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_one_sampler_serves_both_where_their_settings_agree() -> None:
    training, evaluation = samplers()
    assert training is evaluation
    training, evaluation = samplers(top_p=0.5)
    assert (training.config.top_p, evaluation.config.top_p) == (1.0, 0.5)
    assert dataclasses.replace(evaluation.config, top_p=1.0) == training.config


@pytest.mark.parametrize(
    ("evaluation", "warned"),
    [
        ({"temperature": 0.0, "samples": 1, "k": (1,)}, False),
        ({"temperature": 0.0, "samples": 2, "k": (1,)}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 1e-3}, False),
        ({}, False),
    ],
)
def test_equal_samples_are_told_of_once(caplog: pytest.LogCaptureFixture, evaluation: Any, warned: bool) -> None:
    training, greedy = samplers(**evaluation)
    assert greedy.config.temperature == evaluation.get("temperature", 1.0)
    assert training.config.temperature == 1.0
    assert len(caplog.messages) == warned
    assert not warned or "One is enough" in caplog.text
