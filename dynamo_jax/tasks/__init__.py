"""What is learned: prompts, and how an answer is judged.

Verifier workers import this package: it must stay free of jax, grain and transformers, which take seconds to start.
"""

from dynamo_jax.tasks.grading.answers import check_gold
from dynamo_jax.tasks.grading.verifier import Verifier, grade

__all__ = ["Verifier", "check_gold", "grade"]
