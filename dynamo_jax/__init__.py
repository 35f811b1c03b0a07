"""dynamo_jax: reinforcement learning with verifiable rewards in JAX, with DynaMO's allocation and modulation."""

__version__ = "0.1.0"
