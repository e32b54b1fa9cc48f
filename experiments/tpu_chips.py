"""TPU chips by numbers, and the shortest time that a program can take on one: the resource that it keeps busiest."""

import math
from typing import NamedTuple

from hlo import Computation, Instruction
from hlo_costs import Costs


class Chip(NamedTuple):
    """One chip, which is one JAX device.

    Peak rate of bfloat16 products, size and bandwidth of the main memory (HBM) and bandwidth of the interconnect (ICI)
    are those of the system architecture pages: https://cloud.google.com/tpu/docs/v5e (197 TFLOP/s, 16 GB, 819 GB/s,
    400 GB/s in and out over 4 ports), /v5p (459, 95 GB, 2765 GB/s, 1200 GB/s over 6), /v6e (918, 32 GB, 1638 GB/s, 800
    GB/s over 4), /v4 (275, 32 GB, 1200 GB/s, 600 GB/s over 6).
    """

    flops: float  # per second
    memory: float  # bytes
    bandwidth: float  # of it, bytes per second
    ring: float  # bytes per second that leave by the two ports of one dimension of the torus


CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1200e9, 100e9),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 100e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 200e9),
    "v6e": Chip(918e12, 32 * 2**30, 1638e9, 200e9),
}


class Roofline(NamedTuple):
    """Seconds that each resource needs for one run, if it were alone."""

    compute: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """At least so long does a run take: all three at work all the time."""
        return max(self)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return self._fields[self.index(self.seconds)]


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:4x4".

    Raises:
      ValueError: for a chip whose numbers are not here.
    """
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology {topology!r} of chip {name!r}; expected one of {sorted(CHIPS)}")
    return CHIPS[name]


def roofline(costs: Costs, chip: Chip) -> Roofline:
    """The time of each resource for what a program costs; see `times`."""
    return times(chip, flops=costs.flops, moved=costs.read_written, sent=sum(costs.sent().values()))


def times(chip: Chip, *, flops: float, moved: float, sent: float) -> Roofline:
    """The time of each resource, as in "Roofline", Williams et al. (https://doi.org/10.1145/1498765.1498785).

    The interconnect is taken to run one ring at a time, in both directions of one dimension of the torus: a mesh axis
    over several dimensions has more.
    """
    return Roofline(flops / chip.flops, moved / chip.bandwidth, sent / chip.ring)


def kernel_flops(where: Computation, call: Instruction) -> float:
    """The operations of the kernels that alignax calls: splash attention, whose blocks above the diagonal are left out.

    Two products of scores forward; four for keys and values and three for queries backward, since both make the scores
    and their gradient again.
    """
    if not call.name.startswith("splash"):
        return 0.0
    given = [x.shapes[0] for x in where.inputs(call)]
    *rows, heads, length, width = next(x.dims for x in given if x.dtype in ("bf16", "f32") and len(x.dims) >= 3)
    block = next((n for n in (512, 384, 256, 128) if length % n == 0), length)
    products = 2 if "_fwd" in call.name else 4 if "_dkv" in call.name else 3
    return 2.0 * products * math.prod(rows) * heads * length * width * (length + block) / 2
