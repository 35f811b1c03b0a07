"""The loop. `Trainer.step` is one training step, readable from top to bottom; all else is starting and stopping."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from dynamo_jax.allocation.build import make_allocation
from dynamo_jax.allocation.programs import AllocationState
from dynamo_jax.batch import Pool, Rollouts
from dynamo_jax.config import Config
from dynamo_jax.evaluation.scores import evaluate_each
from dynamo_jax.hosts.peers import watched
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.hosts.watchdog import Watchdog
from dynamo_jax.judge import Judge
from dynamo_jax.objective import configured_penalty, group_advantage, group_weight
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import load_hf
from dynamo_jax.policy.model import abstract_policy, init_policy
from dynamo_jax.report import write_report
from dynamo_jax.rollout.build import make_samplers
from dynamo_jax.rollout.sampler import join
from dynamo_jax.rollout.text import some_texts
from dynamo_jax.rounds import EMPTY, Draw, make_rounds, merged
from dynamo_jax.run.agreement import check_same_run, start_of_process_0
from dynamo_jax.run.bucket import locations
from dynamo_jax.run.bucket_folder import open_run_folder
from dynamo_jax.run.contents import Contents, forms
from dynamo_jax.run.folder import RunFolder, Status
from dynamo_jax.run.keeper import Keeper
from dynamo_jax.run.metrics import ProgressBar, plain_numbers, setup_logging
from dynamo_jax.run.phases import Phases
from dynamo_jax.run.profiling import Profile
from dynamo_jax.run.start import START_NAME, start_of_run
from dynamo_jax.run.stopping import Ending, Interrupted, Stopping
from dynamo_jax.run.storage import TemporaryFailure, patiently
from dynamo_jax.run.writer import sample_lines
from dynamo_jax.run.xla_cache import XlaCache
from dynamo_jax.sharding import agreed, make_mesh, start_devices, to_host, total
from dynamo_jax.step_metrics import (
    allocation_metrics,
    logp_drift,
    packing_metrics,
    rollout_metrics,
    shaping_metrics,
    shares,
    skipped_updates,
    update_metrics,
)
from dynamo_jax.tasks.prompts import PromptIterator
from dynamo_jax.tasks.rewards import Grading, verdict_of
from dynamo_jax.tasks.task import Task, build_task
from dynamo_jax.update import Programs, State, make_reference, pack
from dynamo_jax.warmup import warmed_up

log = logging.getLogger("dynamo_jax")

# Streams of random numbers: a step's are fold_in(fold_in(root, step), stream).
SAMPLE, EVALUATE, PERMUTE, INIT, CHOOSE, SELECT, REFILL = range(7)  # round r > 0 samples with REFILL + r


def train(config: Config, profile: tuple[int, int] | None = None) -> None:
    """Train from the start, or from the run folder's newest checkpoint, to `trainer.steps`, and write the report.

    `profile` (first, last): steps whose trace for XProf or TensorBoard is written to `profile/` in the run's folder.

    Raises `ValueError` for whatever a user can mend, `Interrupted` after SIGTERM or SIGINT.
    """
    start_devices(config.device, config.mesh)
    setup_logging(jax.process_index())
    writer = jax.process_index() == 0  # only this process writes
    ending = Ending()  # the one that the peers, the watchdog and whatever is raised go through
    with watched(ending.lost) as ending.peers, ExitStack() as stack:
        stack.push(ending.announce)
        mesh = make_mesh(config.mesh)
        start = start_of_process_0(start_of_run(config.run_dir, config.checkpoint.patience) if writer else None)
        task = build_task(config, start)
        stack.callback(task.verifier.close)
        trainer = Trainer(config, task, mesh, ending)
        if writer:
            trainer.folder = folder = stack.enter_context(open_run_folder(config.run_dir, config.checkpoint.patience))
            folder.check_or_write_config(config)
            folder.write_atomic(START_NAME, start.text())
            stopped = (Interrupted, TemporaryFailure, KeyboardInterrupt)
            ending.status = stack.enter_context(Status(folder, config.trainer.steps, stopped))
        check_same_run(config, task.fingerprints)
        trainer.run(profile)
        if writer:
            with PROGRESS.doing("report", patient=True):
                for action in (partial(write_report, [folder.path], folder.path / "report.html"), folder.sync):
                    patiently(action, "the report", config.checkpoint.patience)
            log.info("The run is complete. See %s", folder.path / "report.html")
        agreed(0)  # leave together: jax does not wait for long at the exit


class Trainer:
    """All that lives as long as the run. `state`, `history` and `data` are what it goes on from (`run/contents.py`)."""

    state: State
    history: AllocationState  # what is known of the prompts
    folder: RunFolder | None = None  # process 0's
    keeper: Keeper
    watchdog: Watchdog
    bar: ProgressBar
    profile: Profile
    _slow = True  # the step before took too long for one to be done again, or finished, within a notice
    _updating = False  # between a step's first update and its end `state` is that of no step

    def __init__(self, config: Config, task: Task, mesh: jax.sharding.Mesh, ending: Ending) -> None:
        c = self.config = config
        self.task, self.mesh = task, mesh
        self.places = locations(c.run_dir)
        self.root = jax.random.key(c.seed)
        self.decoder = decoder_config(c, task.tokenizer.size, mesh)
        graph, abstract_params = abstract_policy(self.decoder)
        self.programs = Programs(graph, abstract_params, c, mesh)
        self.reference = make_reference(c, self.programs)
        self.allocation = make_allocation(c, task.train, mesh)
        self.sampler, self.eval_sampler = make_samplers(graph, c, task.tokenizer, mesh)
        self.rounds, o = make_rounds(c), c.objective
        slots = self.rounds.slots
        self.advantage = jax.jit(
            partial(group_advantage, num_prompts=slots, kind=o.advantage, positive_weight=o.positive_weight)
        )
        self.weight = jax.jit(partial(group_weight, num_prompts=slots, kind=o.group_weight))
        self.data = PromptIterator(
            task.train,
            batch=c.rollout.prompts,
            seed=c.seed,
            max_prompt_tokens=c.task.max_prompt_tokens,
            pad_id=task.tokenizer.pad_id,
        )
        self.grading = Grading(verdict_of(task.verifier))
        self.stopping, self.ending = Stopping(), ending
        self.xla_cache = XlaCache(self.places.xla_cache)
        self._held_out = ""  # the last score, as it is shown
        self._samples = ""  # the step's, to be written with its metrics
        self.phase = Phases()

    def step(self, step: int) -> dict[str, Any]:
        """P prompts, B rollouts, their rewards, one or more updates. Returns the step's metrics."""
        c, killed = self.config, self.task.verifier.counts.get("killed", 0)
        # One round, or as many as the method asks for. A round's rollouts are graded as they come.
        sampled: list[Pool] = []
        while (draw := self.rounds.next(sampled, partial(self._draw, step))) is not None:
            key = self._key(step, REFILL + len(sampled) if sampled else SAMPLE)
            sampled.append(self._sample_and_grade(draw, key))
        pool = merged(sampled)

        # Which rollouts are trained on, what each is worth, and how likely its tokens are before the first update.
        with self.phase("score"):
            rows_B = self.rounds.trained_rows(pool, self._random(step, CHOOSE))
            paying, of_reference = self.reference.in_reward(pool)
            advantage_R, weight_R = self._advantages(paying, rows_B)
            random_R = self._random(step, SELECT).integers(2**32, size=len(advantage_R), dtype=np.uint32)
            order_B = self._random(step, PERMUTE).permutation(rows_B)
            batches = [
                self.programs.place(pack(pool, advantage_R, weight_R, random_R, rows_M, self.programs.shape))
                for rows_M in order_B.reshape(-1, c.mini_batch)
            ]
            batches = [self.reference.in_loss(batch) for batch in batches]
            scored = []
            for batch in batches if self.programs.scores_first else []:
                scored.append(self.programs.score(self.state.params, batch))
                self._listen(scored[-1])
            drift = to_host([drifts for _, drifts in scored])
        self.stopping.check()

        self._updating = True
        with self.phase("update"):
            updates: list[dict[str, Any]] = []
            for number, batch in enumerate(batches):
                old = scored[number][0] if scored else None
                self.state, metrics = self.programs.update(self.state, batch, old, first=not updates)
                updates.append(metrics)
                self._listen(metrics)
            for one in sampled:
                self.history = self.allocation.record_pool(self.history, one, step)
            updates = to_host(updates)
        self._updating = False

        # What the step leaves behind: some of its rollouts, and its metrics.
        with self.phase("decode"):
            shown = some_texts(pool.rollouts, c.logging.rollouts_per_step, self.task.tokenizer)
        self._samples = sample_lines(step, pool, *shown)
        return {
            **update_metrics(updates),
            **allocation_metrics(*shares(sampled)),
            **rollout_metrics(pool, self.phase.seconds["sample"]),
            **packing_metrics(batches, self.programs.shape),
            **self.rounds.metrics(sampled, pool, rows_B),
            **shaping_metrics(c, pool),
            **of_reference,
            "verifier/killed": int(total(np.array(self.task.verifier.counts.get("killed", 0) - killed))),
            "objective/skipped_updates": skipped_updates(step, updates),
            "rollout/logp_drift": logp_drift(drift, updates),
            "data/epoch": self.data.drawn / len(self.task.train),
        }

    def _draw(self, step: int) -> Draw:
        """The next P prompts, and how they share B rollouts."""
        prompts = next(self.data)
        _, prompt_of_B, success_P = to_host(self.allocation.allocate(self.history, prompts.index_P, step))
        return Draw(prompts, prompt_of_B, success_P)

    def _sample_and_grade(self, draw: Draw, key: jax.Array) -> Pool:
        """One round: the rollouts that `draw` asks for, and their rewards.

        Waiting for rollouts is `time/sample`, making text of them `time/decode`.
        """
        prompts, prompt_of_R, success_P = draw
        pieces: list[Rollouts] = []
        judge = Judge(self.grading, self.task.verifier, self.task.tokenizer)
        coming = self.sampler.pieces(self.state.params, prompts, prompt_of_R, key)
        answers = iter([prompts.answers[p] for p in prompt_of_R])
        while True:
            with self.phase("sample"):
                piece = next(coming, None)
            if piece is None:
                break
            with self.phase("decode"):
                judge.add(piece, list(islice(answers, len(piece.length_B))))  # graded while the device goes on
            pieces.append(piece)
            self.stopping.check()
        with self.phase("grade"):
            verdict_R, added_R = judge.result()
        self.stopping.check()
        rollouts, reward_R = join(pieces), verdict_R + added_R
        penalty_R = configured_penalty(rollouts.length_B, self.config)
        return Pool(prompts, prompt_of_R, rollouts, verdict_R > 0.5, reward_R, penalty_R, success_P)

    def _listen(self, queued: Any) -> None:
        """Where steps are slow, a signal is noticed between programs; elsewhere they queue up without waiting."""
        if self._slow:
            jax.block_until_ready(queued)
            self.stopping.check()

    def _advantages(self, pool: Pool, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Group-relative advantage and weight in the loss of each rollout of the pool."""
        reward_R, prompt_of_R = self.rounds.padded(pool.shaped_R, pool.prompt_of_R)
        advantage_R = np.asarray(self.advantage(reward_R, prompt_of_R))[: len(pool.reward_R)]
        weight_R = np.zeros_like(advantage_R)
        real_B = rows_B != EMPTY
        weight_B = self.weight(np.where(real_B, pool.prompt_of_R[rows_B], self.rounds.slots).astype(np.int32))
        weight_R[rows_B[real_B]] = np.asarray(weight_B)[real_B]
        return advantage_R, weight_R

    def run(self, profile: tuple[int, int] | None = None) -> None:
        """From wherever the run stands to its last step."""
        c, writer = self.config, jax.process_index() == 0
        with ExitStack() as stack:
            stack.enter_context(self.stopping.signals())
            stack.callback(self.grading.close)
            if c.trainer.compilation_cache:
                stack.enter_context(self.xla_cache.enabled())
            self.watchdog = Watchdog(c.watchdog, end=self.ending.hangs)
            stack.callback(self.watchdog.close)
            self.keeper = stack.enter_context(
                Keeper(c, self.places, self.folder, self.ending.status, self.stopping.check)
            )
            done, line = self._resume()
            if done is None:
                self._start()
            self.bar = stack.enter_context(ProgressBar(c.trainer.steps, done or 0, c.logging.progress and writer))
            self.profile = stack.enter_context(Profile(self.places.work / "profile", profile if writer else None))
            stack.push(self.ending.announce)
            if done is None:
                self._finish(0, {"policy/parameters": sum(leaf.size for leaf in jax.tree.leaves(self.state.params))})
            elif line is not None:
                self._complete(done, dict(line))  # killed before, or in the evaluation
            elif self._evaluates(done):
                self.keeper.add_score(done, self._score(self.keeper.written()))
            for step in range((done or 0) + 1, c.trainer.steps + 1):
                with PROGRESS.doing(f"step {step}", patient="update" not in self.phase.known):
                    self._run_step(step)
            self._save(max(done or 0, c.trainer.steps), last=True)

    def _run_step(self, step: int) -> None:
        self.phase.begin()
        position = self.data.state()
        try:
            with self.watchdog.watch("step", f"step {step}"), self.profile.of(step):
                metrics = self.step(step)
        except Interrupted:
            if not self._updating:
                self.data.restore(position)  # forgetting the prompts undoes the step
                self._save(step - 1, last=True)
            raise
        self._slow = bool(agreed(self.phase.since_begin() > self.config.checkpoint.notice_seconds / 2))
        self._finish(step, metrics)
        if self.stopping.asked():
            self._save(step, last=True)
            self.stopping.check()

    def _start(self) -> None:
        c, key = self.config, self._key(0, INIT)
        if c.policy.load is not None:
            params = load_hf(c.policy.load, self.decoder)
        elif c.warmup.steps:
            heldout = [prompt.text for prompts in self.task.evals for prompt in prompts.prompts]
            params = warmed_up(self.decoder, c, heldout, key, self.stopping.check)
        else:
            params = init_policy(self.decoder, key)
        self.reference.start(params, self.keeper)
        self.state, self.history = self.programs.init(params), self.allocation.init()

    def _resume(self) -> tuple[int | None, Mapping[str, Any] | None]:
        """Take over the newest checkpoint. Returns its step, and the step's metrics if they are not yet written."""
        saved = self.keeper.resume(forms(self.programs.forms, self.allocation.forms))
        if saved is None:
            return None, None
        if saved.evals not in (None, self.task.fingerprints[1:]):
            raise ValueError(
                f"{self.places.checkpoints}: this run was evaluated on other prompts than the held-out files hold now: "
                "its scores would be of two benchmarks. Restore the files, or set another run_dir to start a new run."
            )
        self.reference.resume(self.keeper)
        self.state, self.history = saved.train, saved.history
        self.data.restore(saved.data)
        log.info("Resuming after step %d", self.keeper.saved)
        return self.keeper.saved, saved.line

    def _evaluate(self) -> dict[str, float]:
        with self.phase("eval"):
            return evaluate_each(
                self.eval_sampler,
                self.state.params,
                self.task.evals,
                self.config,
                self._key(0, EVALUATE),  # the same each time: scores differ by the policy, not by luck
                self.task.tokenizer,
                self.task.verifier,
                each_piece=self.stopping.check,
            )

    def _finish(self, step: int, metrics: dict[str, Any]) -> None:
        """Save what the step has made before anything else takes its time; then evaluate, and write the step's line."""
        c = self.config
        self.keeper.write_samples(step, self._samples)
        # A slow step is saved each time: a notice of preemption may be too short to end the next one.
        if step % c.checkpoint.every == 0 or self._evaluates(step) or self._slow:
            with self.phase("checkpoint"), self.watchdog.watch("checkpoint", f"the checkpoint of step {step}"):
                self._save(step, metrics)
                self.xla_cache.settle()
        self._complete(step, metrics)

    def _complete(self, step: int, metrics: dict[str, Any]) -> None:
        """Evaluate if that is due, and write the line of `step`."""
        score = None
        if self._evaluates(step):
            try:
                with self.watchdog.watch("evaluation", f"the evaluation after step {step}"):
                    scores = self._evaluate()
            except Interrupted:
                self._save(step, metrics, last=True)  # on its way already; the next start evaluates
                raise
            metrics, score = metrics | scores, self._score(scores)
        self.keeper.write(step, metrics | self.phase.taken())
        if step:
            self._held_out = self._held_out if score is None else f"{score:.3f}"
            shown = {"reward": f"{metrics['reward/prompt_mean']:.3f}", "held-out": self._held_out}
            shown["tokens/s"] = f"{metrics['rollout/tokens_per_second']:.0f}"
            self.bar.update(step, {name: value for name, value in shown.items() if value})
        if score is not None:
            self._save(step, last=True)  # again, if the storage has failed meanwhile
            self.keeper.add_score(step, score)

    def _evaluates(self, step: int) -> bool:
        every, last = self.config.eval.every, self.config.trainer.steps
        return step in (0, last) or bool(every and step % every == 0)

    def _score(self, metrics: Mapping[str, Any]) -> float | None:
        """What the best checkpoint is chosen by: the mean Pass@k, k the smallest, of all evaluations."""
        names = [f"eval/{prompts.name}/pass@{min(self.config.eval.k)}" for prompts in self.task.evals]
        scores = [metrics[name] for name in names if metrics.get(name) is not None]
        return float(np.mean(scores)) if scores else None

    def _save(self, step: int, metrics: dict[str, Any] | None = None, last: bool = False) -> None:
        """`metrics`: the step's, as long as its line is not written."""
        line = None if metrics is None else plain_numbers(metrics | self.phase.so_far())
        contents = Contents(self.state, self.history, self.data.state(), self.task.fingerprints[1:], line)
        self.keeper.save(step, contents, last)

    def _key(self, step: int, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.root, step), stream)

    def _random(self, step: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, step, stream])
