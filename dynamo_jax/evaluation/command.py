"""`dynamo-jax eval`."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dynamo_jax.config import Config
from dynamo_jax.evaluation.draw import Piece, answered, content_key, graded_pieces
from dynamo_jax.evaluation.samples import Row, SampleFile, evaluation_of
from dynamo_jax.evaluation.scores import Evaluation, right, table, wide_table
from dynamo_jax.hosts.peers import watched
from dynamo_jax.policy.build import decoder_config
from dynamo_jax.policy.export import load_policy
from dynamo_jax.policy.model import Decoder, abstract_policy
from dynamo_jax.rollout.build import make_samplers
from dynamo_jax.rollout.sampler import Sampler
from dynamo_jax.rollout.text import decode_rollouts
from dynamo_jax.run.agreement import start_of_process_0
from dynamo_jax.run.bucket import is_remote
from dynamo_jax.run.checkpoint import resolve_checkpoint
from dynamo_jax.run.checkpoint_files import written
from dynamo_jax.run.folder import write_atomic
from dynamo_jax.run.metrics import setup_logging
from dynamo_jax.run.start import START_NAME, start_of_evaluation
from dynamo_jax.run.stopping import Ending
from dynamo_jax.sharding import agreed, make_mesh, start_devices, total
from dynamo_jax.tasks.grading.known_golds import known_problem
from dynamo_jax.tasks.prompts import PromptSet
from dynamo_jax.tasks.rewards import Grader, Grading, verdict_of
from dynamo_jax.tasks.task import build_tokenizer, build_verifier, eval_prompts
from dynamo_jax.tasks.tokenizer import Tokenizer

log = logging.getLogger("dynamo_jax")

STREAM = 2  # which random numbers make a sample; 1, which wrote no mark, took the place of the file and of the batch


def eval_command(
    config: Config,
    checkpoint: Path,
    benchmarks: Sequence[str],
    samples: int,
    ks: Sequence[int],
    json_file: Path | None,
    out: Path | None = None,
    regrade: bool = False,
    *,
    allow_dropped: bool = False,
) -> None:
    """Print Pass@k on `benchmarks` (default: the config's held-out prompts); `json_file` gets the numbers, too.

    Every sample is saved in the folder `out` (default: `eval/<checkpoint>` in the run's folder) as soon as its problem
    is done: the same command goes on where it was stopped. With `regrade`, saved samples are judged again, by the
    grader and the references as they are now, and nothing is sampled. Problems longer than `task.max_prompt_tokens` are
    not sampled and count as wrong, unless `allow_dropped`.

    Raises `ValueError` for a k above `samples`, an unreadable checkpoint, no benchmark or one with errors, a
    `json_file` that cannot be written, or saved samples that were drawn with other settings.
    """
    if max(ks) > samples:
        raise ValueError(f"--k {max(ks)} needs at least as many samples, but --samples is {samples}. Raise --samples.")
    if config.task.kind == "math" and not (benchmarks or config.task.eval):
        raise ValueError("there is nothing to evaluate on: name --benchmark FILE, or files in the config's task.eval.")
    if json_file and (json_file.is_dir() or not json_file.absolute().parent.is_dir()):  # before hours of sampling
        raise ValueError(f"--json {json_file}: is a folder, or in none. Give a file name in a folder that exists.")
    start_devices(config.device, config.mesh)
    setup_logging(jax.process_index())
    ending = Ending()
    with watched(ending.lost) as ending.peers, ExitStack() as stack:
        stack.push(ending.announce)  # what process 0 alone finds wrong, such as other samples in the folder, ends all
        label, source = _origin(checkpoint, regrade)
        folder = out or _eval_folder(config) / label
        start = start_of_process_0(start_of_evaluation(folder, checkpoint))
        tokenizer = build_tokenizer(config, start.now)
        prompt_sets = eval_prompts(config, tokenizer, benchmarks, reading=start.reading)
        drawn_with = _drawn_with(config, source, samples, tokenizer) if source and not regrade else {}
        files = [
            SampleFile(folder / f"{p.name}_n{samples}.jsonl", drawn_with | {"prompts": p.fingerprint}, samples)
            for p in prompt_sets
        ]
        opens_thinking = all(prompts.opens_thinking for prompts in prompt_sets)
        verifier = build_verifier(config, reading=start.reading, opens_thinking=opens_thinking)
        stack.callback(verifier.close)
        if not regrade:
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(folder / START_NAME, start.text())
            evaluations = _sample(config, checkpoint, prompt_sets, files, tokenizer, verifier)
        elif jax.process_index() == 0:  # the saved samples are on its disk
            evaluations = [_regrade(file, p, verifier) for file, p in zip(files, prompt_sets, strict=True)]
        killed = int(total(np.array(verifier.counts.get("killed", 0))))
        if jax.process_index() == 0:
            evaluations = [dataclasses.replace(e, allow_dropped=allow_dropped) for e in evaluations]
            known = _known_references(prompt_sets)
            _print(evaluations, ks, known, config.task.max_prompt_tokens)
            results = {
                "checkpoint": str(checkpoint),
                "samples": samples,
                "metrics": {name: value for e in evaluations for name, value in e.metrics(ks).items()},
                "correct": {e.name: e.right_counts for e in evaluations},
                "dropped": {e.name: e.dropped for e in evaluations},
                "known_references": known,
                "killed": killed,
            }
            for path in filter(None, (folder / "results.json", json_file)):
                write_atomic(path, json.dumps(results, indent=1) + "\n")
        agreed(0)  # leave together: jax does not wait for long at the exit


def _known_references(prompt_sets: Sequence[PromptSet]) -> list[str]:
    """What is wrong with which reference answer, of those that are known to be wrong."""
    return [
        f"{prompts.name} {p.id}: {why}"
        for prompts in prompt_sets
        for p in prompts.prompts
        if (why := known_problem(p.id, p.answer)) is not None
    ]


def _print(evaluations: Sequence[Evaluation], ks: Sequence[int], known: Sequence[str], max_prompt_tokens: int) -> None:
    parts = [table(evaluations, ks)]
    if len(evaluations) > 1:
        parts.append(wide_table(evaluations, ks))
    parts += [_dropped_note(e, max_prompt_tokens) for e in evaluations if e.dropped]
    if known:
        parts.append("\n".join(["References known to be wrong, used as they are:", *known]))
    sys.stdout.write("\n\n".join(parts) + "\n")


def _dropped_note(e: Evaluation, limit: int) -> str:
    what = (
        f"{e.name}: {len(e.dropped)} of {len(e.ids) + len(e.dropped)} problems are longer than task.max_prompt_tokens "
        f"= {limit} and were not sampled."
    )
    if e.allow_dropped:
        return f"{what} They are left out of the scores, which are not those of the whole benchmark."
    return f"{what} They count as wrong. Raise task.max_prompt_tokens, or leave them out with --allow-dropped."


def _eval_folder(config: Config) -> Path:
    """In the run's folder; beside it if no run was started there, which would refuse a folder that is not empty.

    Of a run in a bucket, `<run>_eval` where the command is started.
    """
    run = Path(config.run_dir)
    if is_remote(config.run_dir):
        return Path(f"{run.name}_eval")
    return run / "eval" if (run / "config.yaml").is_file() else run.with_name(f"{run.name}_eval")


def _origin(checkpoint: Path, regrade: bool) -> tuple[str, Path | None]:
    """A short name of the checkpoint, and the folder that holds its parameters."""
    if (checkpoint / "config.json").is_file():
        return checkpoint.resolve().name, checkpoint
    if regrade and not checkpoint.exists():
        return checkpoint.name, None  # the samples are all that is needed
    directory, step = resolve_checkpoint(checkpoint)
    return f"step_{step}", directory / str(step)


def _drawn_with(config: Config, source: Path, samples: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the samples of a set of prompts depend on beside its content, in JSON's types."""
    e, decoder = config.eval, decoder_config(config, tokenizer.size, mesh=None)
    return {
        "stream": STREAM,
        "checkpoint": str(source if is_remote(source) else source.resolve()),
        "written": written(source),
        "samples": samples,
        "seed": config.seed,
        "max_tokens": config.rollout.max_tokens,
        "temperature": e.temperature,
        "top_p": e.top_p,
        "stop_ids": list(tokenizer.stop_ids),
        "param_dtype": decoder.param_dtype,
        "compute_dtype": decoder.compute_dtype,
        **dataclasses.asdict(decoder.shape),
    }


def _regrade(file: SampleFile, prompts: PromptSet, verifier: Grader) -> Evaluation:
    rows = file.read(check=False)
    gold_of = {prompt.id: prompt.answer for prompt in prompts.prompts}
    evaluation_of(prompts, file.samples, rows)  # all there, and of these problems
    grades = right(verifier, [(row["text"], gold_of[row["id"]]) for row in rows])
    changed = sum(row["correct"] != bool(grade) for row, grade in zip(rows, grades, strict=True))
    log.info("%s: %d of %d verdicts changed", file.path, changed, len(rows))
    file.drawn_with = file.header() or file.drawn_with
    answers = answered(prompts, [row["text"] for row in rows])
    regraded = [
        row | {"gold": gold_of[row["id"]], "correct": bool(grade), "answered": has_answer}
        for row, grade, has_answer in zip(rows, grades, answers, strict=True)
    ]
    file.write(regraded)
    return evaluation_of(prompts, file.samples, regraded)


def _sample(
    config: Config,
    checkpoint: Path,
    prompt_sets: Sequence[PromptSet],
    files: Sequence[SampleFile],
    tokenizer: Tokenizer,
    verifier: Grader,
) -> list[Evaluation]:
    """Sample what is not yet there, and save it piece by piece. Process 0 has the evaluations, the others have none."""
    mesh = make_mesh(config.mesh)
    writer = jax.process_index() == 0
    saved = [file.read() if writer else [] for file in files]
    decoder = decoder_config(config, tokenizer.size, mesh)
    graph, _ = abstract_policy(decoder)
    params = load_policy(checkpoint, decoder)
    samples = files[0].samples
    sampler = _eval_sampler(config, graph, mesh, tokenizer, samples)
    evaluations = []
    with closing(Grading(verdict_of(verifier))) as grading:
        for prompts, file, rows in zip(prompt_sets, files, saved, strict=True):
            done = agreed(len(rows) // samples)
            if writer:
                file.write(rows)
            key = content_key(jax.random.key(config.seed), prompts)
            pieces = graded_pieces(
                sampler, params, prompts, samples, key, tokenizer, grading, config.task.max_prompt_tokens, done=done
            )  # fmt: skip
            for piece in pieces:
                if writer:
                    new = _rows(prompts, samples, len(rows), piece, tokenizer)
                    file.append(new)
                    rows += new
            if writer:
                evaluations.append(evaluation_of(prompts, samples, rows))
    return evaluations


def _eval_sampler(
    config: Config, graph: nnx.GraphDef[Decoder], mesh: Mesh, tokenizer: Tokenizer, samples: int
) -> Sampler:
    """The evaluation's sampler, with room for the prompts whose `samples` fill its batch: no prefill is wasted."""
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, samples=samples))
    _, sampler = make_samplers(graph, config, tokenizer, mesh)
    shards = config.mesh.batch_shards
    window = -(-max(1, sampler.config.batch // samples) // shards) * shards
    return Sampler(graph, dataclasses.replace(sampler.config, window=window), mesh)


def _rows(prompts: PromptSet, samples: int, start: int, piece: Piece, tokenizer: Tokenizer) -> list[Row]:
    """The lines of a piece whose first sample is the set's number `start`. On process 0, whose share comes first."""
    rollouts = piece.rollouts
    of_others = decode_rollouts(jax.tree.map(lambda x: x[len(piece.texts) :], rollouts), tokenizer)
    rows = []
    for i, text in enumerate([*piece.texts, *of_others]):
        place, sample = divmod(start + i, samples)
        prompt = prompts.prompts[place]
        rows.append(
            {"id": prompt.id, "sample": sample, "gold": prompt.answer, "text": text,
             "tokens": int(rollouts.length_B[i]), "truncated": not bool(rollouts.ended_B[i]),
             "answered": bool(piece.answered_B[i]), "correct": bool(piece.correct_B[i])}
        )  # fmt: skip
    return rows
