"""A plan as text and as JSON, and the compiled text of its programs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dynamo_jax.config import Config
from dynamo_jax.plan.chips import GIB, Chip
from dynamo_jax.plan.cost import Cost
from dynamo_jax.plan.estimate import ProgramEstimate
from dynamo_jax.plan.hlo import one_line_each
from dynamo_jax.plan.lengths import Lengths
from dynamo_jax.plan.step import StepCost

# `kept`: the run's other arrays that stay on the device meanwhile. `peak` includes them; `of HBM`: of what the compiler
# lets a program use. `seconds`: of one call; `links`: how long they take for what a call sends, on one ring.
COLUMNS = (
    "arguments", "outputs", "temporaries", "kept", "peak", "of HBM", "compiled", "seconds", "links", "bound by",
    "verdict",
)  # fmt: skip


def title(config: Config, topology: str, devices: int, kind: str, chip: Chip) -> str:
    m = config.mesh
    return (
        f"{topology}: {devices} x {kind}, {chip.hbm / GIB:.2f} GiB of HBM each; "
        f"mesh data {m.data} x fsdp {m.fsdp} x tensor {m.tensor}. Memory in GiB; all figures are of one device.\n"
        f"{_row('program', *COLUMNS)}\n"
    )


def program_line(one: ProgramEstimate, chip: Chip) -> str:
    plan, cost = one.plan, one.cost
    memory = (plan.arguments, plan.outputs, plan.temporaries, plan.resident, plan.peak)
    times = ("-",) * 3 if cost is None else (_seconds(cost.seconds), _seconds(cost.link_seconds), cost.bound)
    return _row(
        plan.name,
        *("-" if x is None else f"{x / GIB:.3f}" for x in memory),
        "-" if plan.peak is None else f"{plan.peak / chip.hbm:.0%}",
        f"{plan.seconds:.0f} s",
        *times,
        plan.verdict(chip.hbm),
    )


def details(one: ProgramEstimate) -> Iterator[str]:
    """Where a program's time goes: resources, what is sent, kernels, the costliest instructions."""
    cost, usual = one.cost, one.usual
    if cost is None or usual is None:
        return
    shares = ", ".join(f"{name} {seconds / cost.seconds:.0%}" for name, seconds in _largest(cost.by_resource))
    yield (
        f"{one.name}: {_seconds(cost.seconds)} s a call ({shares}); with what is sent {_seconds(cost.low)} s if all "
        f"of it goes on meanwhile, {_seconds(cost.high)} s if none does\n"
    )
    if usual.seconds != cost.seconds:
        yield f"  {_seconds(usual.seconds)} s with these lengths, as its loops then end before their limits\n"
    for kind, sent in _largest(cost.collectives):
        yield f"  {kind}: a device sends {sent / GIB:.3g} GiB\n"
    for kernel in cost.kernels:
        yield (
            f"  kernel {kernel.name}: {_seconds(kernel.seconds)} s in {kernel.turns:.0f} turns at the chip's peak, of "
            f"{kernel.work.flops:.2e} FLOPs and {kernel.work.bytes:.2e} bytes each ({kernel.work.source})\n"
        )
    for entry in cost.costliest():
        yield f"  {_seconds(entry.seconds):>10} s  {entry.where}  ({entry.name}, {entry.turns:.0f} turns)\n"


def step_lines(step: StepCost, programs: Sequence[ProgramEstimate], lengths: Lengths, price: float | None) -> str:
    calls = ", ".join(f"{one.name} {one.calls:g}" for one in programs if one.calls)
    parts = ", ".join(f"{name} {_seconds(seconds)}" for name, seconds in step.phases.items())
    text = (
        f"A step of {lengths}.\n"
        f"  calls: {calls}; {step.padding:.0%} of the packed slots are padding\n"
        f"  {_seconds(step.seconds)} s on the devices ({parts}), {_seconds(step.low)} to {_seconds(step.high)} with "
        f"the links; {step.tokens_per_chip:.0f} tokens/s a chip\n"
        f"  model FLOP utilisation of the real tokens, causal attention counted half: update {step.update_mfu:.1%}, "
        f"score and update {step.mfu:.1%}\n"
    )
    if price is not None:
        text += f"  ${step.dollars(price):.2f} a step of {step.chips:g} chips at ${price:g} a chip-hour\n"
    return text


def as_json(
    config: Config,
    topology: str,
    chip: Chip,
    lengths: Lengths,
    programs: Sequence[ProgramEstimate],
    step: StepCost | None,
    price: float | None,
) -> dict[str, Any]:
    """What `docs/plan.md` describes. Seconds, bytes and FLOPs; of one device where nothing else is said."""
    return {
        "topology": topology,
        "chip": dataclasses.asdict(chip),
        "mesh": dataclasses.asdict(config.mesh),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "lengths": dataclasses.asdict(lengths),
        "fits": all(one.plan.verdict(chip.hbm) == "fits" for one in programs),
        "step": None if step is None else step_json(step, price),
        "programs": [_program(one, chip) for one in programs],
    }


def step_json(step: StepCost, price: float | None = None) -> dict[str, Any]:
    """A step's figures by name."""
    return {
        "seconds": step.seconds,
        "seconds_low": step.low,
        "seconds_high": step.high,
        **{f"{name}_seconds": seconds for name, seconds in step.phases.items()},
        "update_mfu": step.update_mfu,
        "score_update_mfu": step.mfu,
        "model_flops": step.model_flops,
        "tokens": step.tokens,
        "padding_fraction": step.padding,
        "tokens_per_second_per_chip": step.tokens_per_chip,
        "chips": step.chips,
        "price": price,
        "dollars": None if price is None else step.dollars(price),
    }


def _program(one: ProgramEstimate, chip: Chip) -> dict[str, Any]:
    plan = one.plan
    memory: dict[str, Any] = {
        name: getattr(plan, name) for name in ("arguments", "outputs", "temporaries", "resident", "peak")
    }
    said = {
        "name": one.name,
        "phase": one.phase,
        "calls": one.calls,
        "hlo": None if one.hlo is None else str(one.hlo),
        "verdict": plan.verdict(chip.hbm),
        "memory": memory | {"of_hbm": None if plan.peak is None else plan.peak / chip.hbm},
        "compile_seconds": plan.seconds,
    }
    if one.cost is None or one.usual is None:
        return said | {"seconds": None}
    return said | {"seconds": one.cost.seconds, "step_seconds": one.calls * one.usual.seconds} | _cost(one.cost)


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "seconds_low": cost.low,
        "seconds_high": cost.high,
        "bound": cost.bound,
        "seconds_by_resource": dict(cost.by_resource),
        "kernel_seconds": cost.kernel_seconds,
        "kernels": [dataclasses.asdict(kernel) for kernel in cost.kernels],
        "link_seconds": cost.link_seconds,
        "sent_bytes": dict(cost.collectives),
        "costliest": [dataclasses.asdict(entry) for entry in cost.costliest()],
    }


def write_text(one: ProgramEstimate, folder: Path) -> ProgramEstimate:
    """Write a program's compiled text, an instruction a line, below comments that say what its kernels take."""
    if one.plan.text is None or one.cost is None:
        return one
    cost = one.cost
    head = [
        f"// {one.name}: {cost.seconds:.9f} s a call, {cost.seconds - cost.kernel_seconds:.9f} s by the compiler's "
        f"estimated_cycles below and {cost.kernel_seconds:.9f} s of kernels, which carry no estimate",
        *(f"// kernel {k.name}: {k.seconds:.9f} s in {k.turns:.0f} turns ({k.work.source})" for k in cost.kernels),
    ]
    path = folder / f"{one.name.replace(' ', '_').replace('(', '').replace(')', '')}.txt"
    path.write_text("\n".join([*head, one_line_each(one.plan.text)]), encoding="utf-8")
    return dataclasses.replace(one, hlo=path)


def _row(name: str, *cells: str) -> str:
    return f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells[:-1]) + f"  {cells[-1]}"


def _largest(amounts: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(amounts.items(), key=lambda item: -item[1])


def _seconds(x: float) -> str:
    return f"{x:.1f}" if x >= 100 else f"{x:.3f}" if x >= 0.0995 else f"{x:.3g}"
