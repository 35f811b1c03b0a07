"""The settings that are one of a few words. Each is written here once; whoever needs the words asks `get_args`."""

from __future__ import annotations

from typing import Any, Literal, get_args

Device = Literal["auto", "cpu", "gpu", "tpu"]
DType = Literal["float32", "bfloat16"]
Remat = Literal["none", "attention", "dots", "full"]

TaskKind = Literal["arithmetic", "math"]
VerifierKind = Literal["math", "math_verify_compat"]
RewardKind = Literal["exact", "arithmetic", "countdown", "gsm8k"]  # besides those of the verifier

Rule = Literal["uniform", "bernoulli", "neyman", "released", "knapsack", "gvm", "reinforce_ada", "vip"]
KnapsackValue = Literal["info_gain", "one"]

Advantage = Literal["grpo", "dr_grpo", "rloo", "w_reinforce"]
GroupWeight = Literal["rollout", "prompt"]
Ratio = Literal["token", "sequence"]
OldLogp = Literal["score", "sampler"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

CorrectionKind = Literal["none", "truncate", "mask"]
CorrectionLevel = Literal["token", "sequence"]

KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]

Schedule = Literal["constant", "linear", "cosine"]
Rounding = Literal["masters", "stochastic"]

Scope = Literal["minibatch", "microbatch"]
Baseline = Literal["exact", "sequence_mean"]


def check_choice(what: str, value: str, choices: Any) -> None:
    """Raises ValueError, naming `what`, unless `value` is a word of the `Literal` `choices`."""
    words = get_args(choices)
    if value not in words:
        raise ValueError(f"{what} = {value!r}; choose one of {', '.join(words)}.")
