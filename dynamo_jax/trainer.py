"""The loop. `Trainer.step` is one training step, readable from top to bottom; all else is starting and stopping."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np

from dynamo_jax.allocation.build import make_allocation
from dynamo_jax.allocation.programs import AllocationState
from dynamo_jax.batch import Pool, Rollouts, train_batch
from dynamo_jax.config import Config
from dynamo_jax.evaluation.scores import evaluate
from dynamo_jax.hosts.peers import watched
from dynamo_jax.hosts.progress import PROGRESS
from dynamo_jax.hosts.watchdog import Watchdog
from dynamo_jax.judge import Judge
from dynamo_jax.objective import configured_penalty, group_advantage, group_weight
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.hf import load_hf
from dynamo_jax.policy.model import abstract_policy, init_policy, param_shardings
from dynamo_jax.report import write_report
from dynamo_jax.rollout.build import make_samplers
from dynamo_jax.rollout.sampler import join
from dynamo_jax.rollout.text import some_texts
from dynamo_jax.rounds import EMPTY, Draw, make_rounds, merged
from dynamo_jax.run.agreement import check_same_run
from dynamo_jax.run.bucket import locations
from dynamo_jax.run.bucket_folder import open_run_folder
from dynamo_jax.run.checkpoint import Checkpointer
from dynamo_jax.run.folder import RunFolder, Status
from dynamo_jax.run.metrics import ProgressBar, setup_logging
from dynamo_jax.run.profiling import Profile
from dynamo_jax.run.stopping import Ending, Interrupted, Stopping
from dynamo_jax.run.storage import TemporaryFailure, patiently
from dynamo_jax.run.writer import RunWriter, sample_lines
from dynamo_jax.run.xla_cache import XlaCache
from dynamo_jax.sharding import agreed, make_mesh, of_process_0, sharding, start_devices, to_host, to_mesh, total
from dynamo_jax.step_metrics import allocation_metrics, rollout_metrics, shaping_metrics, shares
from dynamo_jax.tasks.prompts import PromptIterator
from dynamo_jax.tasks.rewards import Grading, verdict_of
from dynamo_jax.tasks.task import Task, build_task
from dynamo_jax.update import Programs, TrainState
from dynamo_jax.warmup import warm_up

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
    ending = Ending()
    with watched(ending.lost) as ending.peers, ExitStack() as stack:
        stack.push(ending.announce)
        mesh = make_mesh(config.mesh)
        task = build_task(config)
        stack.callback(task.verifier.close)
        trainer = Trainer(config, task, mesh)
        if writer:
            trainer.folder = folder = stack.enter_context(open_run_folder(config.run_dir, config.checkpoint.patience))
            folder.check_or_write_config(config)
            stopped = (Interrupted, TemporaryFailure, KeyboardInterrupt)
            trainer.status = ending.status = stack.enter_context(Status(folder, config.trainer.steps, stopped))
        check_same_run(config, task.fingerprints)
        trainer.run(profile)
        if writer:
            with PROGRESS.doing("report", patient=True):
                for action in (partial(write_report, [folder.path], folder.path / "report.html"), folder.sync):
                    patiently(action, "the report", config.checkpoint.patience)
            log.info("The run is complete. See %s", folder.path / "report.html")
        agreed(0)  # leave together: jax does not wait for long at the exit


class Trainer:
    """All that lives as long as the run. `state`, `stats`, `data` and `best` are what a checkpoint holds."""

    state: TrainState
    stats: AllocationState
    best: float | None = None
    folder: RunFolder  # process 0's, as all that is written there
    status: Status
    writer: RunWriter | None = None
    _score: float | None = None  # of the step just done

    def __init__(self, config: Config, task: Task, mesh: jax.sharding.Mesh) -> None:
        c = self.config = config
        self.task, self.mesh = task, mesh
        self.places = locations(c.run_dir)
        self.root = jax.random.key(c.seed)
        self.decoder = decoder_config(c, task.tokenizer.size, mesh)
        graph, abstract_params = abstract_policy(self.decoder)
        self.programs = Programs(graph, abstract_params, c, mesh)
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
        self.stopping, self.ending = Stopping(), Ending()
        self.patiently = partial(patiently, patience=c.checkpoint.patience, stop=self.stopping.check, agree=agreed)
        self.xla_cache = XlaCache(self.places.xla_cache)
        self._samples = ""  # the step's, to be written with its metrics
        self._seconds: dict[str, float] = {}
        self._known: set[str] = set()  # phases that were gone through once, with their compilations

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
        with self._phase("score"):
            rows_B = self.rounds.trained_rows(pool, self._random(step, CHOOSE))
            advantage_R, weight_R = self._advantages(pool, rows_B)
            random_R = self._random(step, SELECT).integers(2**32, size=len(advantage_R), dtype=np.uint32)
            order_B = self._random(step, PERMUTE).permutation(rows_B)
            batches = [
                to_mesh(train_batch(pool, advantage_R, weight_R, random_R, rows_M), sharding(self.mesh, "batch"))
                for rows_M in order_B.reshape(-1, c.mini_batch)
            ]
            scored = [self.programs.score(self.state.params, batch) for batch in batches]
            drift = to_host([drift for _, drift in scored])

        # Eq. 29 and H are the current policy's; before a step's first update that is the one scored already.
        with self._phase("update"):
            updates: list[dict[str, Any]] = []
            for batch, (old, _) in zip(batches, scored, strict=True):
                now = self.programs.score(self.state.params, batch)[0] if updates else old
                self.state, metrics = self.programs.update(self.state, batch, old, now)
                updates.append(metrics)
            for one in sampled:
                self.stats = self.allocation.record_pool(self.stats, one, step)
            updates = to_host(updates)

        # What the step leaves behind: some of its rollouts, and its metrics.
        with self._phase("decode"):
            shown = some_texts(pool.rollouts, c.logging.rollouts_per_step, self.task.tokenizer)
        self._samples = sample_lines(step, pool, *shown)
        skipped = self._count_skipped(step, updates)
        return {
            **{name: float(np.mean([update[name] for update in updates])) for name in updates[0]},
            **allocation_metrics(*shares(sampled)),
            **rollout_metrics(pool, self._seconds["sample"]),
            **self.rounds.metrics(sampled, pool, rows_B),
            **shaping_metrics(c, pool),
            "verifier/killed": int(total(np.array(self.task.verifier.counts.get("killed", 0) - killed))),
            "objective/skipped_updates": skipped,
            "rollout/logp_drift": float(max(drift)),
            "data/epoch": self.data.drawn / len(self.task.train),
        }

    def _draw(self, step: int) -> Draw:
        """The next P prompts, and how they share B rollouts."""
        prompts = next(self.data)
        _, prompt_of_B, success_P = to_host(self.allocation.allocate(self.stats, prompts.index_P, step))
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
            with self._phase("sample"):
                piece = next(coming, None)
            if piece is None:
                break
            with self._phase("decode"):
                judge.add(piece, list(islice(answers, len(piece.length_B))))  # graded while the device goes on
            pieces.append(piece)
            self.stopping.check()
        with self._phase("grade"):
            verdict_R, added_R = judge.result()
        self.stopping.check()
        rollouts, reward_R = join(pieces), verdict_R + added_R
        penalty_R = configured_penalty(rollouts.length_B, self.config)
        return Pool(prompts, prompt_of_R, rollouts, verdict_R > 0.5, reward_R, penalty_R, success_P)

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
            opened = partial(Checkpointer, self.places.checkpoints, keep=c.checkpoint.keep)
            self.checkpoints = stack.enter_context(self.patiently(opened, "the checkpoints"))
            done = self.patiently(self._resume, "the newest checkpoint")
            if writer:
                self.writer = stack.enter_context(RunWriter(self.folder, self.status, c, done))
            if done is None:
                self._start()
            self.bar = ProgressBar(c.trainer.steps, done or 0, enabled=c.logging.progress and writer)
            stack.callback(self.bar.close)
            self.profile = stack.enter_context(Profile(self.places.work / "profile", profile if writer else None))
            stack.push(self.ending.announce)
            if done is None:
                sizes = [leaf.size for leaf in jax.tree.leaves(self.state.params)]
                self._finish(0, {"policy/parameters": sum(sizes), **self._evaluate(), **self._times()})
            for step in range((done or 0) + 1, c.trainer.steps + 1):
                with PROGRESS.doing(f"step {step}", patient="update" not in self._known):
                    self._run_step(step)
            self._save(max(done or 0, c.trainer.steps), self._score, last=True)

    def _run_step(self, step: int) -> None:
        c, began, position = self.config, time.perf_counter(), self.data.state()
        try:
            with self.watchdog.watch("step", f"step {step}"), self.profile.of(step):
                metrics = self.step(step)
        except Interrupted:
            self.data.restore(position)  # it stopped before the update: forgetting the prompts undoes the step
            self._save(step - 1, self._score, last=True)
            raise
        if step == c.trainer.steps or (c.eval.every and step % c.eval.every == 0):
            with self.watchdog.watch("evaluation", f"the evaluation after step {step}"):
                metrics |= self._evaluate()
        self._finish(step, {**metrics, **self._times(), "time/step": time.perf_counter() - began})
        if self.stopping.asked():
            self._save(step, self._score, last=True)
            self.stopping.check()

    def _start(self) -> None:
        c = self.config
        key = self._key(0, INIT)
        if c.policy.load is not None:
            params = load_hf(c.policy.load, self.decoder)
        elif c.warmup.steps:
            heldout = [prompt.text for prompts in self.task.evals for prompt in prompts.prompts]
            log.info("Supervised warm-up: %d steps", c.warmup.steps)
            alone = dataclasses.replace(self.decoder, mesh=None)
            # Every process trains its own, alike; hosts of another make may differ in the last bit.
            host = of_process_0(warm_up(alone, c, heldout, key, lambda _: self.stopping.check()))
            params = to_mesh(host, param_shardings(host, self.mesh))
        else:
            params = init_policy(self.decoder, key)
        self.state, self.stats = self.programs.init(params), self.allocation.init()

    def _resume(self) -> int | None:
        """Take over the newest checkpoint. Returns its step, None if there is none."""
        target = {"train": self.programs.abstract_state, "stats": self.allocation.abstract_stats}
        found = self.checkpoints.restore_newest(target)
        if found is None:
            return None
        done, saved, host = found
        self.state, self.stats, self.best = saved["train"], saved["stats"], host["best"]
        self.data.restore(host["data"])
        log.info("Resuming after step %d", done)
        return done

    def _evaluate(self) -> dict[str, float]:
        e = self.config.eval
        metrics: dict[str, float] = {}
        with self._phase("eval"):
            for number, prompts in enumerate(self.task.evals):
                # The same random numbers each time: scores differ by the policy, not by luck.
                key = jax.random.fold_in(self._key(0, EVALUATE), number)
                evaluation = evaluate(
                    self.eval_sampler,
                    self.state.params,
                    prompts,
                    e.samples,
                    key,
                    self.task.tokenizer,
                    self.task.verifier,
                    self.config.task.max_prompt_tokens,
                )
                metrics |= evaluation.metrics(e.k)
        return metrics

    def _finish(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the step's line, then its checkpoint if one is due: a checkpoint is never newer than its metrics."""
        c = self.config
        names = [f"eval/{prompts.name}/pass@{min(c.eval.k)}" for prompts in self.task.evals]
        scores = [metrics[name] for name in names if name in metrics]
        score = self._score = float(np.mean(scores)) if scores else None
        write = partial(self.writer.write, step, metrics, self._samples) if self.writer else _nothing
        self.patiently(write, f"the metrics and rollouts of step {step}")
        if step:
            speed = metrics["rollout/tokens_per_second"]
            self.bar.update(step, reward=metrics["reward/mean"], tokens_per_second=speed, score=score)
        better = score is not None and (self.best is None or score > self.best)
        if better:
            self.best = score
        if better or step % c.checkpoint.every == 0 or step == c.trainer.steps:
            with self._phase("checkpoint"), self.watchdog.watch("checkpoint", f"the checkpoint of step {step}"):
                self._save(step, score)
                self.xla_cache.settle()

    def _save(self, step: int, score: float | None = None, last: bool = False) -> None:
        """Start to save, in the background; the `last` time, only return when all is safe."""
        state = {"train": self.state, "stats": self.stats}
        host = {"data": self.data.state(), "best": self.best}

        def save() -> None:
            self.checkpoints.save(step, state, host, score)
            if last:
                self.checkpoints.wait()

        sync = partial(self.writer.sync, step) if self.writer else _nothing
        with PROGRESS.doing("checkpoint", patient=True):  # hosts may take their time with their parts
            self.patiently(sync, f"the metrics up to step {step}")
            self.patiently(save, f"the checkpoint of step {step}")

    def _count_skipped(self, step: int, updates: list[dict[str, Any]]) -> int:
        """How many of the step's updates were skipped, each with a warning that names the metric and the step."""
        skipped = 0
        for number, update in enumerate(updates, 1):
            bad = [name for name in ("objective/loss", "objective/grad_norm") if not np.isfinite(update[name])]
            skipped += bool(bad)
            for name in bad:
                log.warning("step %d, update %d: %s is %s; the update is skipped", step, number, name, update[name])
        return skipped

    def _key(self, step: int, stream: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self.root, step), stream)

    def _random(self, step: int, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, step, stream])

    def _times(self) -> dict[str, float]:
        """`time/<phase>` in seconds since the last call. A checkpoint's time is in the line after it."""
        times = {f"time/{phase}": seconds for phase, seconds in self._seconds.items()}
        self._seconds = {}
        return times

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to `time/<name>`. The first time programs are compiled, for however long."""
        began = time.perf_counter()
        with PROGRESS.doing(name, patient=name not in self._known):
            yield
        self._known.add(name)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began


def _nothing() -> None:
    """What a process that writes nothing does where process 0 writes."""
