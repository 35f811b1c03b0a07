"""Device code, each kernel with a plain reference beside it."""

from dynamo_jax.kernels.token_stats import token_stats

__all__ = ["token_stats"]
