"""What one run of a compiled program costs a device: collectives, products, bytes through memory; loops count in full.

All of it is read from the program that one device runs, after partitioning: work that XLA repeats on every device, or a
batch that it gathers, shows here and nowhere in the source.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from hlo import Computation, Instruction, Module, Shape, Unknown, executions, fused

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
    *("after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done"),
}
MAIN, HOST = 0, 5  # memories: others are on the chip, and their bytes cost nothing here
Kernel = Callable[[Computation, Instruction], float]  # the floating-point operations of a custom call


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    devices: int  # that take part together
    payload: int  # bytes that a device brings to it
    times: float  # how often it runs
    line: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends over all its runs, by rings.

        Of n devices with b bytes each: (n - 1) b to gather, (n - 1) / n b to reduce and scatter or to exchange, twice
        that to reduce for all, b to permute. See "Optimization of Collective Communication Operations in MPICH",
        Thakur et al. (https://doi.org/10.1177/1094342005051521).
        """
        n, part = self.devices, (self.devices - 1) / max(self.devices, 1)
        factors = {"all-gather": n - 1, "all-reduce": 2 * part, "collective-permute": 1 if n > 1 else 0}
        return self.times * self.payload * factors.get(self.kind, part)


class Costs(NamedTuple):
    """Of one run, on one device."""

    flops: float  # of matrix products and kernels, 2 for each multiplication with its addition
    read_written: float  # bytes between main memory and the chip
    host: float  # bytes between main memory and the host's
    collectives: tuple[Collective, ...]

    def sent(self) -> dict[str, float]:
        """Bytes sent by kind of collective."""
        return {kind: sum(one.sent for one in self.collectives if one.kind == kind) for kind in COLLECTIVES}


def costs(module: Module, *, unknown: Unknown, kernel: Kernel = lambda where, call: 0.0) -> Costs:
    """What a run of the program costs.

    Args:
      module: of `hlo.parse`.
      unknown: how often a loop runs whose bound is not in the program.
      kernel: the operations of a custom call, such as a Pallas kernel, of which the text says nothing.
    """
    times, inside = executions(module, unknown), fused(module)
    flops, moved, host = 0.0, 0.0, 0.0
    for name, computation in module.computations.items():
        count = times.get(name, 0.0)
        if not count:
            continue
        for x in computation.instructions.values():
            flops += count * (kernel(computation, x) if x.op == "custom-call" else _flops(computation, x))
            if name not in inside:
                moved += count * _traffic(module, computation, x, MAIN)
                host += count * _traffic(module, computation, x, HOST)
    return Costs(flops, moved, host, collectives(module, times))


def collectives(module: Module, times: dict[str, float]) -> tuple[Collective, ...]:
    """Every collective once: a TPU's program names one that overlaps with work in several places, by its channel."""
    found: dict[str, Collective] = {}
    for name, computation in module.computations.items():
        for x in computation.instructions.values():
            kind = x.op.removesuffix("-start")
            if kind not in COLLECTIVES or not times.get(name):
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # and what follows keeps its own part
                kind = "reduce-scatter"
            payload = sum(y.bytes for y in computation.inputs(x))
            one = Collective(kind, _together(x), payload, times[name], x.line.strip())
            key = x.attribute("channel_id") or f"{name}/{x.name}"
            if key not in found or found[key].times < one.times:
                found[key] = one
    return tuple(sorted(found.values(), key=lambda one: -one.sent))


def _together(x: Instruction) -> int:
    """How many devices take part in each group: `{{0,1},{2,3}}`, `[groups,size]<=[...]` or `mesh['a'=2,...] {'a'}`."""
    if x.op.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", x.line.split("source_target_pairs=")[1].split("}}")[0] + "}")
        return 2 if any(a != b for a, b in pairs) else 1
    text = x.line.split("replica_groups=", 1)[1]
    if text.startswith("mesh["):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", text.split("]")[0]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", re.split(r"\}", text.split("]", 1)[1])[0])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if text.startswith("["):
        return int(text[1:].split("]")[0].split(",")[-1])
    return len(text.split("}")[0].strip("{").split(","))


def _flops(computation: Computation, x: Instruction) -> float:
    if x.op == "dot":
        left, contracted = computation.inputs(x)[0].shapes[0], x.attribute("lhs_contracting_dims") or ""
        return 2.0 * x.shapes[0].size * math.prod(left.dims[int(i)] for i in re.findall(r"\d+", contracted))
    return _convolved(computation, x) if x.op == "convolution" else 0.0


def _convolved(computation: Computation, x: Instruction) -> float:
    """A convolution, which on a TPU every product is: only taps that meet an input, not padding, are counted."""
    left, right = (y.shapes[0].dims for y in computation.inputs(x))
    labels = re.split(r"_|->", x.attribute("dim_labels") or "")
    window, taps = x.line.partition("window={")[2].partition("}")[0], 1.0
    options = dict(re.findall(r"(\w+)=([\dx_\-]+)", window))
    for i, size in enumerate(options["size"].split("x") if "size" in options else ()):
        get = {name: options[name].split("x")[i] for name in options}
        before = int(get.get("pad", "0_0").split("_")[0])
        stride, wide, apart = (int(get.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        outputs, inputs = x.shapes[0].dims[labels[2].index(str(i))], left[labels[0].index(str(i))]
        places = np.arange(outputs)[:, None] * stride - before + np.arange(int(size))[None] * apart
        taps *= int(np.sum((places % wide == 0) & (places >= 0) & (places // wide < inputs)))
    ways = {name: x.shapes[0].dims[labels[2].index(name)] for name in "bf"}
    groups = int(x.attribute("batch_group_count") or 1)
    return 2.0 * right[labels[1].index("i")] * ways["b"] * ways["f"] * taps / groups


def _traffic(module: Module, computation: Computation, x: Instruction, memory: int) -> float:
    """Bytes that an instruction reads from a memory and writes to it."""
    if x.op in FREE or x.op.endswith("-done"):
        return 0.0
    if x.op.endswith("-start"):  # its tuple: what is read, what is written, and a context
        moved = _in(x.shapes[1:2], memory)
        return moved + (min(x.shapes[1].bytes, _in(x.shapes[:1], memory)) if len(x.shapes) > 1 else 0)
    inputs = computation.inputs(x)
    if x.op == "fusion":
        inner = module.computations[x.called[0]]
        read = sum(min(_in(y.shapes, memory), _read(inner, p)) for y, p in zip(inputs, inner.parameters))
        return read + min(_in(x.shapes, memory), _written(inner))
    if x.op in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in(x.shapes, memory)
    if x.op in ("dynamic-update-slice", "scatter"):
        return 2.0 * _in(inputs[-1 if x.op == "scatter" else 1].shapes, memory)
    return _in(x.shapes, memory) + sum(_in(y.shapes, memory) for y in inputs)


def _in(shapes: tuple[Shape, ...], memory: int) -> int:
    return sum(shape.bytes for shape in shapes if shape.memory == memory)


def _read(inner: Computation, parameter: Instruction) -> float:
    """Bytes of a fusion's parameter that it reads: slices of it, where that is all that it takes."""
    total = 0.0
    for x in _users(inner, parameter):
        first = bool(x.operands) and x.operands[0] in _aliases(inner, parameter)
        if x.op in ("dynamic-slice", "slice", "gather") and first:
            total += x.bytes
        elif not (x.op in ("dynamic-update-slice", "scatter") and first):  # which write into it, in place
            return parameter.bytes
    return total


def _written(inner: Computation) -> float:
    """Bytes that a fusion writes: what it updates, where it does so in place."""
    roots = inner.inputs(inner.root) if inner.root.op == "tuple" else [inner.root]
    total = 0.0
    for x in roots:
        while x.op == "bitcast":
            x = inner.inputs(x)[0]
        updates = {"dynamic-update-slice": 1, "scatter": -1}
        total += inner.inputs(x)[updates[x.op]].bytes if x.op in updates else x.bytes
    return total


def _aliases(inner: Computation, x: Instruction) -> set[str]:
    """The names under which the same bytes go."""
    names = {x.name}
    for y in inner.instructions.values():
        if y.op == "bitcast" and names & set(y.operands):
            names.add(y.name)
    return names


def _users(inner: Computation, x: Instruction) -> list[Instruction]:
    names = _aliases(inner, x)
    return [y for y in inner.instructions.values() if y.op != "bitcast" and names & set(y.operands)]
