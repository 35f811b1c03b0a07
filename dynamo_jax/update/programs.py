"""The jitted programs of the policy update. Each works on one micro-batch of packed rows, or on what all of them left.

    score           log-probs and entropies of a micro-batch's tokens
    terms           what each token of the mini-batch brings to the loss: advantages, extremes, thresholds
    update          the gradient of a micro-batch, added to those before
    update (apply)  the optimizer's step, once all have been added

Whatever is a mean, a maximum or a count is taken over the whole mini-batch, so packing, micro-batch size and mesh
change the time and nothing else. Where a mini-batch is one micro-batch the last three are one program, `update`, which
takes the statistics from its own forward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.batch import PackedRows, TokenStats, TrainBatch
from dynamo_jax.config import Config
from dynamo_jax.objective.terms import Metrics, reads_now
from dynamo_jax.policy.model import Decoder
from dynamo_jax.run.contents import Form
from dynamo_jax.sharding import sharding, to_mesh
from dynamo_jax.update.gradient import (
    Accumulated,
    grad_shardings,
)
from dynamo_jax.update.optimizer import make_optimizer
from dynamo_jax.update.packing import MiniBatch, Shape
from dynamo_jax.update.state import (
    MasterState,
    State,
    TrainState,
    abstract_state,
    init_state,
    with_masters,
)
from dynamo_jax.update.steps import PolicyUpdate


def shape_of(config: Config) -> Shape:
    """Of a mini-batch's arrays."""
    return Shape(config.mini_batch // config.micro_batch, config.micro_batch, config.row_tokens)


class Programs:
    """Every program compiled once; `traces` counts how often each was traced."""

    def __init__(self, graph: nnx.GraphDef[Decoder], abstract_params: Any, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh, self.shape = config, mesh, shape_of(config)
        self.optimizer = make_optimizer(config.optimizer, config.updates)
        self.abstract_state = abstract_state(abstract_params, self.optimizer, mesh, config.optimizer.rounding)
        self.forms = [Form(self.abstract_state)]
        if isinstance(self.abstract_state, MasterState):  # older versions had no masters
            self.forms.append(Form(TrainState(*self.abstract_state[:4]), with_masters))
        self.alone = self.shape.micro_batches == 1
        # With one update a step what the policy says of its own rollouts is what the update's forward pass says.
        one_update = config.mini_batch == config.rollout.budget
        self.scores_first = config.objective.old_logp == "score" and not (self.alone and one_update)
        self.traces: dict[str, int] = {}
        rows, everywhere = sharding(mesh, None, "batch"), sharding(mesh)
        # Shardings are pinned: if the compiler chose them, a step's output would not match the next step's input.
        in_state = jax.tree.map(lambda x: x.sharding, self.abstract_state)
        of_metrics: Any = everywhere
        in_sum = Accumulated(grad_shardings(abstract_params, mesh), of_metrics, of_metrics)
        self.terms_shardings = (rows, everywhere, in_sum)
        step = PolicyUpdate(graph, config, mesh, self.optimizer)
        compiled = partial(_counted, self.traces)
        init = partial(init_state, optimizer=self.optimizer, rounding=config.optimizer.rounding)
        self.init = jax.jit(init, out_shardings=in_state)
        self.empty_program = jax.jit(lambda: step.no_stats(self.shape), out_shardings=rows)
        self.score_program = compiled("score", step.score, (rows, everywhere), donate=(3,))
        self.terms_program = compiled("terms", step.terms, self.terms_shardings)
        self.gradient_program = compiled("update", step.add_gradient, in_sum, donate=(0,))
        self.apply_program = compiled("update (apply)", step.apply, (in_state, everywhere), donate=(0,))
        self.whole_program = compiled("update", step.whole, (in_state, everywhere), donate=(0,))

    def place(self, mini: MiniBatch) -> MiniBatch:
        """The mini-batch on the devices: its rows split, what is known of each rollout on all."""
        rows, everywhere = sharding(self.mesh, None, "batch"), sharding(self.mesh)
        where = TrainBatch(PackedRows(*[rows] * 4), *[everywhere] * 5)  # type: ignore[arg-type]
        return mini._replace(batch=to_mesh(mini.batch, where))

    def score(self, params: Any, mini: MiniBatch) -> tuple[TokenStats, list[jax.Array]]:
        """Statistics [I, G, S] of a mini-batch, and how far each micro-batch's are from the sampler's."""
        stats, drifts = self.empty_program(), []
        for index in range(mini.live):
            stats, drift = self.score_program(params, mini.batch, np.int32(index), stats)
            drifts.append(drift)
        return stats, drifts

    def update(self, state: State, mini: MiniBatch, old: TokenStats | None, *, first: bool) -> tuple[State, Metrics]:
        """One optimizer update on one mini-batch.

        Args:
            state: donated.
            old: what `score` said before the step's first update, if it was asked (`scores_first`).
            first: whether this is that update: `old`, if there is one, is then of `state.params`.

        Returns: the new state, and float32 scalars over the mini-batch. If the loss or the gradient is not finite, the
        parameters and the optimizer stay as they were and `skipped` goes up by one.
        """
        if self.alone:
            return self.whole_program(state, mini.batch, None if old is None else old.logp)
        old_logp = mini.batch.rows.sampled_logp if old is None else old.logp
        if not reads_now(self.config):
            now = TokenStats(old_logp, old_logp, old_logp)
        elif first and old is not None:
            now = old
        else:
            now, _ = self.score(state.params, mini)
        terms, metrics, total = self.terms_program(state.params, mini.batch, old_logp, now)
        for index in range(mini.live):
            total = self.gradient_program(total, state.params, mini.batch, old_logp, terms, np.int32(index))
        return self.apply_program(state, total, metrics)


def _counted(traces: dict[str, int], name: str, f: Any, out: Any, donate: tuple[int, ...] = ()) -> Any:
    """`f`, jitted. `traces[name]` goes up once a trace, not once a call."""
    traces.setdefault(name, 0)

    def program(*arguments: Any) -> Any:
        traces[name] += 1
        return f(*arguments)

    return jax.jit(program, donate_argnums=donate, out_shardings=out)
