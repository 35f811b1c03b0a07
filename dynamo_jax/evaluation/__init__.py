"""How good a policy is: Pass@1 and Pass@k with intervals, the saved samples behind them, and `dynamo-jax eval`."""

from dynamo_jax.evaluation.scores import pass_at_k

__all__ = ["pass_at_k"]
