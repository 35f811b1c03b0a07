"""The time of a compiled program, against sums by hand over `small.hlo`: written by hand, in the compiler's words.

Its entry calls a product (17,000 cycles), a kernel with an estimate of its own and one without, a loop of 10 turns with
a slice of a stack (16,000) and a loop of 3 (20,000), and a conditional whose longer branch has 90,000.
"""

from pathlib import Path

import pytest
from jax.experimental.pallas import tpu as pltpu

from dynamo_jax.plan.chips import CHIPS, chip_of
from dynamo_jax.plan.collectives import Collective
from dynamo_jax.plan.cost import HBM, LINKS, MATRIX, VECTOR, program_cost
from dynamo_jax.plan.hlo import one_line_each, parse

V5E = CHIPS["TPU v5 lite"]
TEXT = (Path(__file__).parent / "small.hlo").read_text()
PROGRAM = parse(TEXT)
MIB = 2**20
CYCLES = 17_000 + 10 * (16_000 + 3 * 20_000) + 90_000
KERNELS = 394e9 / 197e12 + 8 * MIB / 819e9  # FLOPs of its own estimate; operand and result of the other one


def approximately(x):
    return pytest.approx(x, rel=1e-9)


def test_seconds_are_the_cycles_and_the_kernels():
    cost = program_cost(PROGRAM, V5E)
    assert cost.kernel_seconds == approximately(KERNELS)
    assert cost.seconds == approximately(CYCLES / 1.5e9 + KERNELS)
    assert sum(cost.by_resource.values()) == approximately(cost.seconds)
    assert [(k.name, k.turns, k.work.source) for k in cost.kernels] == [
        ("token_stats.1", 1, "its cost estimate"),
        ("plain_kernel.1", 1, "operands and results"),
    ]


def test_each_instruction_counts_for_the_resource_that_takes_at_least_half_of_it():
    """A turn's slice reads and writes 4 MiB of its stack: 10.2 of 10.7 us. `negate` moves 8 MiB in 10.2 of 13.3 us. The
    product reads 2 MiB twice, as one operand each, and writes to the core: 5.1 of 11.3 us. A sine: 10.2 of 60 us."""
    by_resource = program_cost(PROGRAM, V5E).by_resource
    assert by_resource == {
        MATRIX: approximately(17_000 / 1.5e9 + 394e9 / 197e12),
        HBM: approximately(10 * (16_000 + 3 * 20_000) / 1.5e9 + 8 * MIB / 819e9),
        VECTOR: approximately(90_000 / 1.5e9),
    }


def test_what_is_sent():
    """An all-gather that starts, goes on and ends is one, and another with its channel counts, too. 4 devices of a
    group: 3 parts of 1 MiB; a reduce-scatter of 4 MiB sends 3/4 of them; 30 permutes of 4 MiB each go one way."""
    cost = program_cost(PROGRAM, V5E)
    assert cost.collectives == {
        "all-gather": 3 * MIB,
        "collective-permute": 30 * 4 * MIB,
        "reduce-scatter": 3 * MIB,
    }
    assert cost.wire == 126 * MIB
    assert cost.link_seconds == approximately(6 * MIB / 100e9 + 120 * MIB / 50e9)
    assert cost.fastest_links == approximately(126 * MIB / 200e9)
    assert cost.low == max(cost.seconds, cost.fastest_links)
    assert cost.high == approximately(cost.seconds + cost.link_seconds)
    assert cost.bound == LINKS


def test_a_loop_may_end_earlier():
    """`decode` is the function of the outer loop: 4 turns of it, and 12 of the inner one."""
    whole, early = program_cost(PROGRAM, V5E), program_cost(PROGRAM, V5E, {"decode": 4, "other": 1})
    assert whole.seconds - early.seconds == approximately(6 * (16_000 + 3 * 20_000) / 1.5e9)
    assert early.collectives["collective-permute"] == 12 * 4 * MIB


def test_the_costliest_instructions_name_their_line():
    entries = program_cost(PROGRAM, V5E).costliest(4)
    assert [(e.name, e.turns, e.where) for e in entries] == [
        ("token_stats.1", 1, "jit(small)/token_stats/pallas_call"),
        ("negate.1", 30, "update/programs.py:12"),
        ("fusion.2", 10, "policy/model.py:77 decode"),  # the library that it calls is no line of ours
        ("sine.1", 1, "jit(small)/cond/sin"),
    ]


def test_lines_of_the_text_are_whole():
    text = one_line_each(TEXT)
    assert text.count("\n") == TEXT.count("\n") - 2
    assert parse(text) == PROGRAM
    assert next(line for line in text.splitlines() if "%token_stats.1 =" in line).endswith('"0"}}}')
    assert one_line_each(text) == text


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule nothing\n")


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        ("all-gather", 7 * 80),
        ("reduce-scatter", 70),
        ("all-reduce", 140),
        ("all-to-all", 160),
        ("collective-permute", 80),
    ],
)
def test_bytes_on_the_wire(kind, wire):
    one = Collective(kind, 80.0, 8)
    assert one.wire == wire
    assert one.seconds(V5E) == wire / (50e9 if kind == "collective-permute" else 100e9)
    assert Collective(kind, 80.0, 1).wire == (80 if kind == "collective-permute" else 0)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
    ],
)
def test_sizes_of_groups(groups, size):
    text = TEXT.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    sent = program_cost(parse(text), V5E).collectives["reduce-scatter"]
    assert sent == (size - 1) / size * 4 * MIB


SPLASH = """
ENTRY %main (q: bf16[2,3,4096,128], k: bf16[2,4096,128], v: bf16[2,4096,128], m: s8[1,8,8]) -> RESULT {
  %q = bf16[2,3,4096,128]{3,2,1,0} parameter(0)
  %k = bf16[2,4096,128]{2,1,0} parameter(1)
  %v = bf16[2,4096,128]{2,1,0} parameter(2)
  %m = s8[1,8,8]{2,1,0} parameter(3)
  ROOT %attention.1 = RESULT custom-call(%m, %q, %k, %v), custom_call_target="tpu_custom_call", METADATA
}
"""
OUT, KEYS = "bf16[2,3,4096,128]{3,2,1,0}", "bf16[2,4096,128]{2,1,0}"


@pytest.mark.parametrize(
    ("kernel", "result", "products"),
    [
        ("splash_mqa_fwd_segmented_residuals", OUT, 2),
        ("splash_mha_dq_no_residuals", OUT, 3),
        ("splash_mqa_dkv_segmented_no_residuals", f"({KEYS}, {KEYS})", 4),
        ("splash_mha_dkv_no_residuals", f"(bf16[8,2,3,4096,128]{{4,3,2,1,0}}, {KEYS}, {KEYS})", 5),  # the fused one
    ],
)
def test_splash_attention_makes_the_blocks_that_a_causal_mask_leaves(kernel, result, products):
    """8 x 8 blocks of 512: 36 on and below the diagonal, for 6 heads. [512, 128] times [128, 512] is 2^26 FLOPs."""
    name = f"jit(f)/jit(_splash_attention)/{kernel}/pallas_call"
    text = SPLASH.replace("METADATA", f'metadata={{op_name="{name}"}}').replace("RESULT", result)
    (found,) = program_cost(parse(text), V5E).kernels
    assert found.work.flops == products * 6 * 36 * 2**26
    assert found.seconds == found.work.flops / 197e12


def test_the_chips_agree_with_jax():
    """FLOPs and bandwidth of a device within 2% of jax's own table (whose bandwidth of v5p is 11% lower)."""
    names = {"v4": "TPU_V4", "v5e": "TPU_V5E", "v5p": "TPU_V5P", "v6e": "TPU_V6E", "tpu7x": "TPU_7X"}
    for chip in CHIPS.values():
        version = pltpu.ChipVersion[names[chip.name]]
        info = pltpu.get_tpu_info_for_chip(version, 2 if chip.name == "v5p" else 1)
        assert chip.flops == pytest.approx(info.bf16_ops_per_second * (info.num_cores or 1), rel=0.02)
        assert chip.name == "v5p" or chip.bandwidth == pytest.approx(info.mem_bw_bytes_per_second, rel=0.02)


def test_an_unknown_chip_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"--topology v9:2x2: .* TPU v9 are not known.* v5e \(TPU v5 lite\)"):
        chip_of("TPU v9", "v9:2x2")
