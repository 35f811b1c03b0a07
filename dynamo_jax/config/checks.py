"""Combinations of valid settings that cannot run, each with its remedy."""

from __future__ import annotations

import json
from typing import Any

from dynamo_jax.config.tree import ArchitectureConfig, Config, MeshConfig

Problem = tuple[str, Any, str, str]  # key, value, why it is impossible, remedy


# What a chat template is given or can call without a setting: the arguments of transformers' `apply_chat_template` and
# the globals of its templates. A value of such a name would be refused there, or take the place of what is needed.
TEMPLATE_OWN = frozenset({
    "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template",
    "add_generation_prompt", "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "strftime_now", "raise_exception", "namespace", "dict", "range", "lipsum", "cycler", "joiner",
    "true", "false", "none",
})  # fmt: skip

COLDEST = 1e-30  # the smallest temperature above 0 that is sampled with; logits of 1e8 are still finite
LASTING = 1e9  # steps; ten thousand rollouts of a prompt, rounded, are still all there after fifty thousand


def impossible(c: Config) -> list[Problem]:
    """Every combination of valid values that cannot run."""
    return [
        *_batch_problems(c),
        *_temperature_problems(c),
        *_allocation_problems(c),
        *_objective_problems(c),
        *_kl_problems(c),
        *_optimizer_problems(c),
        *_task_problems(c),
        *_policy_problems(c),
    ]


def _batch_problems(c: Config) -> list[Problem]:
    prompts, budget, low, high = c.rollout.prompts, c.rollout.budget, c.allocation.low, c.allocation.high
    shards = c.mesh.batch_shards
    mesh = f"mesh.data * mesh.fsdp = {c.mesh.data} * {c.mesh.fsdp}"
    problems: list[Problem] = []
    if low * prompts > budget:
        why = f"{prompts} prompts x {low} rollouts need {low * prompts}, but a step has {budget}"
        remedy = f"Lower allocation.low to at most {c.rollout.per_prompt} or raise rollout.per_prompt."
        problems.append(("allocation.low", low, why, remedy))
    if high * prompts < budget:
        why = f"{prompts} prompts x {high} rollouts hold only {high * prompts} of a step's {budget}"
        remedy = f"Raise allocation.high to at least {c.rollout.per_prompt} or lower rollout.per_prompt."
        problems.append(("allocation.high", high, why, remedy))
    needed = {"grpo": 1, "w_reinforce": 1, "rloo": 2, "dr_grpo": 3}[c.objective.advantage]
    if low < needed:
        why = f"objective.advantage = {c.objective.advantage} needs groups of at least {needed}"
        problems.append(("allocation.low", low, why, f"Set allocation.low={needed}."))
    if budget % c.mini_batch:
        why = f"does not divide the {budget} rollouts of a step"
        problems.append(("trainer.mini_batch", c.mini_batch, why, "Choose a divisor."))
    if c.mini_batch % c.micro_batch:
        why = f"does not divide the mini-batch, which has up to {c.mini_batch} rows"
        problems.append(("trainer.micro_batch", c.micro_batch, why, "Choose a divisor."))
    if c.row_tokens < (longest := c.task.max_prompt_tokens + c.rollout.max_tokens):
        why = f"does not hold a prompt of {c.task.max_prompt_tokens} tokens with a completion of {c.rollout.max_tokens}"
        problems.append(("trainer.row_tokens", c.row_tokens, why, f"Set {longest} or more, or leave it out."))
    if budget % c.rollout_batch:
        why = f"does not divide the {budget} rollouts of a step"
        problems.append(("rollout.batch", c.rollout_batch, why, "Choose a divisor."))
    for key, value in (("trainer.micro_batch", c.micro_batch), ("rollout.batch", c.rollout_batch)):
        if value % shards:
            why = f"is not a multiple of {mesh}"
            problems.append((key, value, why, f"Choose a multiple of {shards}, or a smaller mesh."))
    if max(c.eval.k) > c.eval.samples:
        why = f"Pass@k needs k samples a problem, and eval.samples = {c.eval.samples}"
        problems.append(("eval.k", list(c.eval.k), why, f"Raise eval.samples to {max(c.eval.k)}."))
    return problems


def _temperature_problems(c: Config) -> list[Problem]:
    problems: list[Problem] = []
    if c.rollout.temperature == 0:
        why = "training draws its rollouts from a distribution, and at 0 there is only one of each prompt"
        remedy = "Set it above 0; eval.temperature=0 evaluates greedily."
        problems.append(("rollout.temperature", c.rollout.temperature, why, remedy))
    for key, value in (("rollout.temperature", c.rollout.temperature), ("eval.temperature", c.eval.temperature)):
        if 0 < value < COLDEST:
            why = "is so close to 0 that logits divided by it are beyond float32"
            problems.append((key, value, why, "eval.temperature=0 is the limit, greedy decoding; training needs more."))
    return problems


def _allocation_problems(c: Config) -> list[Problem]:
    a, per_prompt = c.allocation, c.rollout.per_prompt
    problems: list[Problem] = []
    if a.rule == "released" and a.released.initial_budget > per_prompt:
        why = f"exploration takes the whole budget of {per_prompt} rollouts a prompt and leaves other prompts with none"
        remedy = f"Lower it to at most {per_prompt}."
        problems.append(("allocation.released.initial_budget", a.released.initial_budget, why, remedy))
    if a.rule == "released" and a.half_life < LASTING:
        why = "the counts of the released rule never fade; these would be forgotten as the run goes on"
        problems.append(("allocation.half_life", a.half_life, why, "Set allocation.half_life=1e9."))
    if a.rule == "reinforce_ada" and per_prompt < 2:
        why = "reinforce_ada looks for a right and a wrong answer to every prompt"
        problems.append(("rollout.per_prompt", per_prompt, why, "Set rollout.per_prompt=2 or more."))
    return problems


def _objective_problems(c: Config) -> list[Problem]:
    o = c.objective
    problems: list[Problem] = []
    if (o.clip_low is None) != (o.clip_high is None):
        why = f"clip_low = {o.clip_low} and clip_high = {o.clip_high} bound the ratio together"
        problems.append(("objective.clip_low", o.clip_low, why, "Give both, or null for both."))
    low, high = o.correction.low, o.correction.high
    if low >= high:
        why = f"is not below objective.correction.high = {high}"
        problems.append(("objective.correction.low", low, why, "Lower it, to 0.5 for example."))
    elif not low <= 1 <= high:
        name, value = ("low", low) if low > 1 else ("high", high)
        why = "cuts tokens on which sampler and trainer agree, whose weight is 1"
        remedy = "Lower it to at most 1." if low > 1 else "Raise it to at least 1."
        problems.append((f"objective.correction.{name}", value, why, remedy))
    if o.clip_cov.enabled and o.clip_cov.low >= o.clip_cov.high:
        why = f"is not below objective.clip_cov.high = {o.clip_cov.high}"
        problems.append(("objective.clip_cov.low", o.clip_cov.low, why, "Lower it."))
    if o.clip_cov.enabled and o.kl_cov.enabled:
        why = "Clip-Cov and KL-Cov are two answers to the same tokens"
        problems.append(("objective.kl_cov.enabled", True, why, "Enable one of them."))
    if o.kl_cov.enabled and c.mini_batch >= c.rollout.budget:
        why = "a step of one update has no ratio but 1, where the penalty of KL-Cov is 0, and so is its gradient"
        remedy = f"Set trainer.mini_batch to a part of the {c.rollout.budget} rollouts of a step, for several updates."
        problems.append(("objective.kl_cov.enabled", True, why, remedy))
    if o.overlong.enabled and o.overlong.buffer > c.rollout.max_tokens:
        why = f"is longer than rollout.max_tokens = {c.rollout.max_tokens}"
        problems.append(("objective.overlong.buffer", o.overlong.buffer, why, "Lower it."))
    if o.overlong.enabled and o.advantage == "w_reinforce":
        why = "w_reinforce knows right and wrong only, no graded reward"
        problems.append(("objective.overlong.enabled", True, why, "Choose another objective.advantage."))
    if o.advantage == "w_reinforce" and (c.task.reward.format_bonus or c.task.reward.length_penalty):
        why = "w_reinforce knows right and wrong only, nothing that task.reward adds"
        problems.append(("objective.advantage", o.advantage, why, "Choose another, or set what is added to 0."))
    if c.modulation.enabled and c.modulation.entropy_change == "sequence_mean" and o.ratio == "sequence":
        why = "the released estimate is defined for ratios of tokens"
        problems.append(("modulation.entropy_change", "sequence_mean", why, "Set modulation.entropy_change=exact."))
    if c.rollout.dynamic_sampling.enabled and c.allocation.rule == "reinforce_ada":
        why = "reinforce_ada samples in rounds of its own"
        problems.append(("rollout.dynamic_sampling.enabled", True, why, "Use one of the two."))
    return problems


def _kl_problems(c: Config) -> list[Problem]:
    kl, key = c.objective.kl, "objective.kl.in"
    if not kl.coefficient or kl.in_ == "loss":
        return []
    problems: list[Problem] = []
    if c.objective.advantage == "w_reinforce":
        why = "objective.advantage = w_reinforce knows right and wrong only, nothing that is taken from a reward"
        problems.append((key, kl.in_, why, "Set objective.kl.in=loss, or choose another advantage."))
    rounds = {
        "rollout.dynamic_sampling.enabled = true": c.rollout.dynamic_sampling.enabled,
        "allocation.rule = reinforce_ada": c.allocation.rule == "reinforce_ada",
    }
    for setting in (name for name, on in rounds.items() if on):
        why = f"{setting} chooses rollouts by their rewards before the reference has seen them"
        problems.append((key, kl.in_, why, "Set objective.kl.in=loss."))
    return problems


def _optimizer_problems(c: Config) -> list[Problem]:
    o = c.optimizer
    problems: list[Problem] = []
    if o.schedule != "constant" and (o.decay_steps or c.updates) <= o.warmup_steps:
        end = f"optimizer.decay_steps = {o.decay_steps}" if o.decay_steps else f"the run's {c.updates} updates"
        why = f"leaves nothing of {end} to optimizer.schedule = {o.schedule}"
        problems.append(("optimizer.warmup_steps", o.warmup_steps, why, "Lower it, or set schedule=constant."))
    if o.schedule == "constant" and o.floor:
        why = "a constant rate has no end to fall to"
        problems.append(("optimizer.floor", o.floor, why, "Set optimizer.schedule to linear or cosine."))
    if o.schedule == "constant" and o.decay_steps:
        why = "a constant rate does not decay"
        problems.append(("optimizer.decay_steps", o.decay_steps, why, "Set optimizer.schedule to linear or cosine."))
    if o.rounding == "stochastic" and c.policy.param_dtype == "float32":
        why = "parameters in float32 are not rounded"
        problems.append(("optimizer.rounding", o.rounding, why, "Set policy.param_dtype=bfloat16."))
    return problems


def _task_problems(c: Config) -> list[Problem]:
    problems = _template_problems(c)
    if c.task.kind == "math":
        for key, value in (("task.train", c.task.train), ("task.tokenizer", c.task.tokenizer)):
            if not value:
                problems.append((key, value, "the task `math` needs it", "Give a path."))
        if c.warmup.steps:
            why = "only task.kind = arithmetic has worked solutions to warm up on"
            problems.append(("warmup.steps", c.warmup.steps, why, "Set warmup.steps=0."))
        return problems
    for key, value in (("task.train", c.task.train), ("task.eval", c.task.eval), ("task.tokenizer", c.task.tokenizer)):
        if value:
            why = "task.kind = arithmetic makes its own problems and tokenizer"
            problems.append((key, value, why, "Set task.kind=math to train on files."))
    if c.task.arithmetic.train_prompts < c.rollout.prompts:
        why = f"a step takes rollout.prompts = {c.rollout.prompts} different prompts"
        problems.append(("task.arithmetic.train_prompts", c.task.arithmetic.train_prompts, why, "Ask for more."))
    operations = c.task.arithmetic.max_operations
    if c.task.max_prompt_tokens < 2 * operations + 2:
        why = f"a chain of {operations} operations has {2 * operations + 2} tokens"
        problems.append(("task.max_prompt_tokens", c.task.max_prompt_tokens, why, f"Set {2 * operations + 2} or more."))
    if c.rollout.max_tokens < operations + 1:
        why = f"a worked solution of {operations} operations has {operations + 1} tokens"
        problems.append(("rollout.max_tokens", c.rollout.max_tokens, why, f"Set {operations + 1} or more."))
    return problems


def _template_problems(c: Config) -> list[Problem]:
    values, key = c.task.chat_template_kwargs, "task.chat_template_kwargs"
    if values and (c.task.kind == "arithmetic" or not c.task.chat_template):
        unused = "task.chat_template = false" if c.task.kind == "math" else "task.kind = arithmetic"
        return [(key, values, f"{unused} uses no chat template, which could read them", "Take them out.")]
    problems: list[Problem] = []
    for name, value in values.items():
        if name in TEMPLATE_OWN:
            why = "a chat template gets what has this name from the program"
            problems.append((f"{key}.{name}", value, why, "Take it out; only a template's own variables are set here."))
        elif not name.isidentifier():
            why = "a chat template cannot read a variable of this name"
            problems.append((f"{key}.{name}", value, why, "Use letters, digits and _, such as enable_thinking."))
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            problems.append((f"{key}.{name}", value, "holds a number that is not finite", "Give a finite one."))
    return problems


def _policy_problems(c: Config) -> list[Problem]:
    if (c.policy.load is None) == (c.policy.architecture is None):
        why = "exactly one of policy.load and policy.architecture says what the policy is"
        return [("policy.load", c.policy.load, why, "Give the one and leave the other out.")]
    return architecture_problems(c.policy.architecture, c.mesh) if c.policy.architecture else []


def architecture_problems(a: ArchitectureConfig, mesh: MeshConfig) -> list[Problem]:
    """Shapes that do not fit together or that the mesh cannot divide; also used on a loaded `config.json`."""
    key = "policy.architecture."
    head_dim = a.head_dim or a.hidden_size // a.num_heads
    divisors = [
        ("num_heads", a.num_heads, "num_kv_heads", a.num_kv_heads),
        ("num_kv_heads", a.num_kv_heads, "mesh.tensor", mesh.tensor),
        ("intermediate_size", a.intermediate_size, "mesh.tensor", mesh.tensor),
        ("hidden_size", a.hidden_size, "mesh.fsdp", mesh.fsdp),
    ]
    if a.head_dim is None:
        divisors.append(("hidden_size", a.hidden_size, "num_heads", a.num_heads))
    if a.vocab_size is not None:
        divisors.append(("vocab_size", a.vocab_size, "mesh.tensor", mesh.tensor))
    problems: list[Problem] = [
        (key + name, value, f"is not a multiple of {by} = {divisor}", "Choose a multiple.")
        for name, value, by, divisor in divisors
        if value % divisor
    ]
    if head_dim % 2:
        problems.append((key + "head_dim", head_dim, "rotary embeddings need an even head size", "Choose an even one."))
    return problems
