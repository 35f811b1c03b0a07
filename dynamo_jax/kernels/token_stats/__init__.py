"""Log-probability, entropy and E[pi * Lambda] of each token from hidden states, without keeping the logits."""

from dynamo_jax.kernels.token_stats.api import token_stats

__all__ = ["token_stats"]
