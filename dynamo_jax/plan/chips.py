"""The chips that a plan knows: what one device of each can do at most, and where that is written."""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a slice, as jax counts devices: a chip, or one of the two cores of a chip whose cores are apart."""

    name: str  # as in a topology
    clock: float  # cycles a second that the compiler's estimates are in
    flops: float  # peak of bfloat16 products, a second
    hbm: float  # bytes that the compiler lets a program use: the figure in its own out-of-memory message
    bandwidth: float  # of HBM, bytes a second
    link: float  # of one link to a neighbour, one way, bytes a second
    links: int  # to neighbours
    devices: int = 1  # of a chip

    @property
    def ring(self) -> float:
        """Bytes a second that go round a ring of neighbours: half of them each way."""
        return 2 * self.link

    @property
    def all_links(self) -> float:
        """Bytes a second if a collective keeps every link of a device busy, as on several axes of a torus at once."""
        return self.links * self.link


# Peak FLOPs, HBM bandwidth and links: the tables of https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e and tpu7x
# (read 2026-11-27). They give the interconnect of a chip in both directions, of all links together: a link has, one
# way, that / links / 2. (That of v4 is given one way, as that of v5e and v5p once was.)
# The clock is no published figure. It follows from the peak: a matrix unit of 128 x 128 makes 2 * 128 * 128 FLOPs a
# cycle, and v4, v5e and v5p have four of them a core. v6e and TPU7x have two units of 256 x 256, and the clock of v6e
# with which the compiler's estimate of a copy gives the same share of the HBM's bandwidth as on v5e (0.81) is 1.75 GHz;
# TPU7x has units of the same shape, so its clock is larger in proportion to its peak.
CHIPS = {
    # 275 TFLOPs, 1,228 GB/s and 2,400 Gbit/s one way (6 links) a chip of two devices
    "TPU v4": Chip("v4", 1.05e9, 137.5e12, 15.25 * GIB, 614e9, 25e9, 6, devices=2),
    # 459 TFLOPs, 2,765 GB/s and 1,200 GB/s (6 links); both cores are one device
    "TPU v5": Chip("v5p", 1.75e9, 459e12, 95.73 * GIB, 2765e9, 100e9, 6),
    # 197 TFLOPs, 819 GB/s and 400 GB/s (4 links)
    "TPU v5 lite": Chip("v5e", 1.5e9, 197e12, 15.75 * GIB, 819e9, 50e9, 4),
    # 918 TFLOPs, 1,638 GB/s and 800 GB/s (4 links)
    "TPU v6 lite": Chip("v6e", 1.75e9, 918e12, 31.24 * GIB, 1638e9, 100e9, 4),
    # 2,307 TFLOPs, 7,380 GB/s and 1,200 GB/s (6 links) a chip of two devices
    "TPU7x": Chip("tpu7x", 2.2e9, 1153.5e12, 94.74 * GIB, 3690e9, 50e9, 6, devices=2),
}


def chip_of(device_kind: str, topology: str) -> Chip:
    """The chip that jax calls `device_kind`. Raises `ValueError` if its figures are not known."""
    if device_kind not in CHIPS:
        known = ", ".join(f"{chip.name} ({kind})" for kind, chip in CHIPS.items())
        raise ValueError(
            f"--topology {topology}: the peak figures of a {device_kind} are not known, only those of {known}. Take a "
            "slice of one of these, or add the chip to dynamo_jax/plan/chips.py."
        )
    return CHIPS[device_kind]
