"""How many bytes a traced function holds at once, told from its jaxpr alone: nothing is compiled, nothing is run.

The functions are walked in order. What only passes values on element by element is taken to be fused into whoever
reads it, and costs nothing; what a matrix product, a loop, a sort or a gather reads or writes is an array in memory,
from where it is made to where it is last read. A loop holds what its body holds at its fullest.

This is a model of what a compiler does, not the compiler: XLA chooses another order and shares other buffers.
`alignax.models.planning` says how far off it was.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from jax.extend import core

CALLS = ("pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
OPAQUE = ("dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated", "scan", "while", "cond", "sort")
OPAQUE += ("gather", "scatter", "scatter-add", "dynamic_update_slice", "cumsum", "top_k", "ffi_call", "random_bits")
REDUCING = ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_prod", "argmax", "argmin")


class Value:
    """One array of a flattened program, told from others by identity."""

    def __init__(self, aval: Any):
        self.bytes = math.prod(aval.shape) * aval.dtype.itemsize if hasattr(aval, "shape") else 0


class Op(NamedTuple):
    """One operation of a flattened program; an input that is a literal is None."""

    name: str
    params: dict[str, Any]
    shapes: list[Any]  # of its inputs
    inputs: list[Value | None]
    outputs: list[Value]

    @property
    def opaque(self) -> bool:
        """Whether it reads arrays from memory, not elements as they come."""
        return self.name in OPAQUE or any(isinstance(x, core.Jaxpr | core.ClosedJaxpr) for x in self.params.values())


def peak_bytes(jaxpr: core.Jaxpr, *, slices: Collection[int] = (), stacked: Collection[int] = ()) -> int:
    """The most bytes it holds at once beside its inputs, its outputs included.

    Args:
      jaxpr: of `jax.make_jaxpr`.
      slices: numbers of the inputs that are slices of an array, which become arrays only where one is read.
      stacked: numbers of the outputs that are written into an array, not kept.
    """
    values: dict[core.Var, Value] = {x: Value(x.aval) for x in [*jaxpr.invars, *jaxpr.constvars]}
    sliced = {values[jaxpr.invars[i]] for i in slices}
    given = set(values.values()) - sliced
    ops = list(_flattened(jaxpr, values))
    outputs = [(i in stacked, values[x]) for i, x in enumerate(jaxpr.outvars) if isinstance(x, core.Var)]
    written = {x for is_stacked, x in outputs if is_stacked}
    kept = {x for is_stacked, x in outputs if not is_stacked}
    ops = _in_order(_needed(ops, written | kept), kept, recomputing=_recomputes(jaxpr))
    arrays = (_arrays(ops, sliced) | kept) - given
    born, dies = _lifetimes(ops, arrays, sliced, written, kept)
    return _fullest(ops, born, dies)


def _fullest(ops: list[Op], born: dict[Value, int], dies: dict[Value, int]) -> int:
    change = [0] * (len(ops) + 2)
    for value, start in born.items():
        change[start] += value.bytes
        change[max(dies.get(value, start), start) + 1] -= value.bytes
    most = held = 0
    for op, difference in zip(ops, change):
        held += difference
        most = max(most, held + _inside(op))
    return most


def _inside(op: Op) -> int:
    """What an operation itself needs: the fullest moment of a loop's body; a copy of what a product reads across."""
    if op.name == "scan":
        body, consts = op.params["jaxpr"].jaxpr, op.params["num_consts"]
        carried = op.params["num_carry"]
        slices, stacked = range(consts + carried, len(body.invars)), range(carried, len(body.outvars))
        return peak_bytes(body, slices=slices, stacked=stacked)
    if op.name == "while":
        return peak_bytes(op.params["body_jaxpr"].jaxpr)
    if op.name == "cond":
        return max(peak_bytes(branch.jaxpr) for branch in op.params["branches"])
    if op.name == "dot_general":
        (summed, _), _ = op.params["dimension_numbers"]
        left = op.shapes[0]
        if sorted(summed) != list(range(left.ndim - len(summed), left.ndim)):
            return left.size * left.dtype.itemsize  # transposed first, as where a weight's gradient sums over tokens
    return 0


def _flattened(jaxpr: core.Jaxpr, values: dict[core.Var, Value]) -> Iterator[Op]:
    """The operations, those of called functions in place of the calls; fills `values`."""
    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, equation.invars
        read = [None if isinstance(x, core.Literal) else values[x] for x in inputs]
        inner = next((x for x in equation.params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)), None)
        if name not in CALLS or inner is None:
            values |= {x: Value(x.aval) for x in equation.outvars}
            yield Op(name, equation.params, [x.aval for x in inputs], read, [values[x] for x in equation.outvars])
            continue
        inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
        own = {x: Value(x.aval) for x in inner.constvars}
        own |= {x: Value(x.aval) if value is None else value for x, value in zip(inner.invars, read)}
        yield from _flattened(inner, own)
        for x, result in zip(equation.outvars, inner.outvars):
            values[x] = Value(x.aval) if isinstance(result, core.Literal) else own[result]


def _needed(ops: list[Op], outputs: Iterable[Value]) -> list[Op]:
    needed, found = set(outputs), []
    for op in reversed(ops):
        if not needed.isdisjoint(op.outputs):
            found.append(op)
            needed |= set(op.inputs) - {None}
    return found[::-1]


def _recomputes(jaxpr: core.Jaxpr) -> bool:
    """Whether a part of it is a checkpoint, in which values are computed again."""
    calls = [equation for equation in jaxpr.eqns if equation.primitive.name in CALLS]
    inside = (x for call in calls for x in call.params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr))
    if any(call.primitive.name in ("checkpoint", "remat2") for call in calls):
        return True
    return any(_recomputes(x.jaxpr if isinstance(x, core.ClosedJaxpr) else x) for x in inside)


def _in_order(ops: list[Op], kept: set[Value], *, recomputing: bool) -> list[Op]:
    """What nothing waits for, as weights' gradients, comes last.

    Where values are computed again it stays where it stands: XLA was seen to save memory so, but hardly past loops.
    """
    if recomputing and not any(op.name in ("scan", "while") for op in ops):
        return ops
    leads, first, last = set(kept), [], []
    for op in reversed(ops):
        awaited = not leads.isdisjoint(op.outputs)
        (first if awaited else last).append(op)
        leads |= set(op.inputs) if awaited else set()
    return first[::-1] + last[::-1]


def _arrays(ops: list[Op], sliced: set[Value]) -> set[Value]:
    """The values that are arrays in memory: what is read or written as a whole."""
    constant, found = set(), set()
    for op in ops:
        if op.opaque or op.name in REDUCING:
            found |= set(op.outputs)
        elif all(x is None or x in constant for x in op.inputs):
            constant |= set(op.outputs)
        if op.opaque:
            fused = constant if op.name == "scan" else set()
            count = op.params["num_consts"] if op.name == "scan" else 0
            found |= {x for i, x in enumerate(op.inputs) if x is not None and not (i < count and x in fused)}
    return found


def _lifetimes(ops: list[Op], arrays: set[Value], sliced: set[Value], written: set[Value], kept: set[Value]):
    """Where each array is made and where it is last read, through whatever is fused."""
    born: dict[Value, int] = {}
    dies: dict[Value, int] = {}
    behind: dict[Value, set[Value]] = {x: {x} for x in sliced & arrays}  # the arrays that a value is made from
    for now, op in enumerate(ops):
        born |= {x: now for x in op.inputs if x in sliced and x in arrays and x not in born}
        read = set().union(*(behind.get(x, ()) for x in op.inputs if x is not None))
        for x in op.outputs:
            if x in arrays:
                born[x], behind[x] = now, {x}
            else:
                behind[x] = read
            if x in arrays or x in written:
                dies |= dict.fromkeys(read, now)
    for x in kept:
        dies |= dict.fromkeys(behind.get(x, ()), len(ops))
    return born, dies
