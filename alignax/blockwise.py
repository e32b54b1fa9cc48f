"""What every token makes of its distribution over the vocabulary, a block of tokens at a time.

`[B, T, V]` exists in neither direction: a block's logits are made, measured and forgotten, and made again for the
gradient. Only tokens that were asked for meet the vocabulary: they are gathered to the front, and the loop ends when
none is left, so that prompts and padding cost nothing.

On one device the tokens of all rows are one list; and so they are on each of several under `jax.set_mesh`, when the
gradient of the head is summed over the devices once. Without it rows keep to themselves, since gathering across rows
would move them between devices: the loop is as long as the fullest row, and each block sums the head's gradient.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int, Shaped

from alignax.sharding import divisors, row_axes
from alignax.types import Array

Found = dict[str, Array]


class Side(NamedTuple):
    """One network's way from states to logits."""

    head: Callable[[Array], Array]  # states [..., D] -> logits [..., V]; it may close over parameters
    states: Float[Array, "R M D"]
    at: Int[Array, "B T"]  # which of the M states of its bundle, B / R rows that follow one another, a token reads


def measured(
    measure: Callable[..., Found],
    sides: tuple[Side, ...],
    arrays: tuple[Array | None, ...],
    chosen: Bool[Array, "B T"],
    *,
    chunk: int | None = None,
) -> Found:
    """`measure` of the chosen tokens: {name: [B, T, ...]}, 0 where a token is not chosen.

    Differentiable, in reverse, in the states and in whatever `head` and `measure` close over.

    Args:
      measure: `(logits of each side [r, n, V], arrays [r, n, ...], known) -> {name: [r, n, ...]}`, a token by itself.
        `known` is None, or in the gradient what it gave for the same tokens before.
      sides: the networks.
      arrays: what else is known of each token, `[B, T, ...]`, or None; constants.
      chosen: which tokens to measure.
      chunk: about how many tokens meet the vocabulary at once; None: 256 on a CPU, 2048 elsewhere. More where rows on
        several devices keep to themselves and would make over 16 blocks.
    """
    chex.assert_equal_shape([chosen, *(side.at for side in sides)])
    shape, rows = chosen.shape, math.gcd(*(len(side.states) for side in sides))
    if not chosen.size:
        raise ValueError(f"tokens of shape {shape}; expected at least one row and one column")
    sides = tuple(_in_bundles(side, rows) for side in sides)
    pools, tokens = [side.states for side in sides], _Tokens(tuple(side.at for side in sides), arrays, chosen)
    tokens = jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[2:]), tokens)
    axes, listed = _placement(rows)

    def run(pools: list[Array], tokens: _Tokens) -> Found:
        size = _width(tokens.chosen.shape, chunk, listed)
        heads, of_heads, logits = zip(*(_explicit(side.head, _front(side.states, size)) for side in sides))
        front = _front(arrays, size)
        first, of_first, known = _explicit(lambda *args: measure(*args, None), logits, front)
        again, of_again, _ = _explicit(measure, logits, front, known)
        constants, structure = jax.tree.flatten((of_heads, of_first, of_again))
        program = _Program(structure, heads, first, again, size[1])
        return (_listed if listed else _run)(program, constants, pools, tokens)

    if axes:
        of_tokens = P(axes, *_sequence(tokens.chosen.shape[1]))
        specs, names = (P(axes), of_tokens), {*axes, *of_tokens[1:]}
        run = jax.shard_map(run, in_specs=specs, out_specs=of_tokens, axis_names=names, check_vma=False)
    return {name: x.reshape(*shape, *x.shape[2:]) for name, x in run(pools, tokens).items()}


def _in_bundles(side: Side, rows: int) -> Side:
    """The side in `rows` bundles, each of several of its own: networks may have different layouts."""
    (bundles, count, width), length = side.states.shape, len(side.at)
    first = jnp.arange(length) * bundles // length % (bundles // rows) * count
    return Side(side.head, side.states.reshape(rows, -1, width), side.at + jnp.expand_dims(first, 1))


def _placement(rows: int) -> tuple[tuple[str, ...], bool]:
    """The axes of the ambient mesh over which rows lie, and whether a device may make one list of all that it has."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return (), jax.device_count() == 1
    if not set(mesh.axis_names) - set(mesh.manual_axes):
        return (), True  # inside of pmap or shard_map: what is here is the device's own
    axes = tuple(axis for axis in row_axes(mesh) if axis not in mesh.manual_axes)
    shared = axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
    return shared, bool(shared) or not axes


def _sequence(length: int) -> tuple[str, ...]:
    """The axis over which the tokens of a row lie: each of its devices has all states, and measures its own tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    return divisors(free, length, "sequence")


def _width(shape: tuple[int, ...], chunk: int | None, listed: bool) -> tuple[int, int]:
    """Rows and columns of a block. Of rows that keep to themselves at most 16 blocks: each sums the head's gradient."""
    if chunk is None:
        chunk = 256 if jax.default_backend() == "cpu" else 2048
    if listed:
        return 1, min(shape[0] * shape[1], max(1, chunk))
    return shape[0], min(shape[1], max(1, chunk // shape[0], -(-shape[1] // 16)))


class _Program(NamedTuple):
    """What is static. The functions close over nothing: their first argument is what they closed over."""

    structure: Any  # of the constants of all functions
    heads: tuple[Callable, ...]
    first: Callable
    again: Callable
    width: int


class _Tokens(NamedTuple):
    at: tuple[Array, ...]  # Int [R, N] of each side
    arrays: tuple[Array | None, ...]  # [R, N, ...]
    chosen: Array  # Bool [R, N]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Moving:
    """Which arrays a derivative is asked for: none for the head under adapters, nor for a reference."""

    constants: tuple[bool, ...]
    pools: tuple[bool, ...]


def _listed(program: _Program, constants: list[Array], pools: list[Array], tokens: _Tokens) -> Found:
    """The same with the tokens of all rows as one list."""
    rows = len(pools[0])
    at = [jnp.expand_dims(jnp.arange(rows) * pool.shape[1], 1) + x for pool, x in zip(pools, tokens.at)]
    joined = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), (pools, tokens._replace(at=tuple(at))))
    found: Found = _run(program, constants, *joined)
    return {name: x.reshape(rows, -1, *x.shape[2:]) for name, x in found.items()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(program: _Program, constants: list[Array], pools: list[Array], tokens: _Tokens) -> Found:
    return _aligned(_compact(program, constants, pools, tokens), tokens.chosen)


def _forward(program: _Program, constants: list, pools: list, tokens: Any):
    moving = _Moving(tuple(x.perturbed for x in constants), tuple(x.perturbed for x in pools))
    constants, pools = [x.value for x in constants], [x.value for x in pools]
    tokens = jax.tree.map(lambda x: x.value, tokens)
    known = _compact(program, constants, pools, tokens)
    return _aligned(known, tokens.chosen), (constants, pools, tokens, known, moving)


def _compact(program: _Program, constants: list[Array], pools: list[Array], tokens: _Tokens) -> Found:
    """The measure of the chosen tokens, one after the other: {name: [R, N, ...]}, what follows them being 0."""
    order, blocks = _order(tokens.chosen, program.width)
    of_heads, of_first, _ = program.structure.unflatten(constants)

    def of_block(index: Array) -> Found:
        block = _block(program.width, order, index, pools, tokens)
        logits = tuple(head(own, x) for head, own, x in zip(program.heads, of_heads, block.states))
        return program.first(of_first, logits, block.arrays)

    def put(index: Array, found: Found) -> Found:
        own, start = of_block(index), index * program.width
        return {name: jax.lax.dynamic_update_slice_in_dim(x, own[name], start, 1) for name, x in found.items()}

    shapes = jax.eval_shape(of_block, 0)
    empty = {name: jnp.zeros((*order.shape, *x.shape[2:]), x.dtype) for name, x in shapes.items()}
    return jax.lax.fori_loop(0, blocks, put, empty)


def _backward(program: _Program, kept: Any, cotangents: dict[str, Any]):
    constants, pools, tokens, known, moving = kept
    cotangents = {name: x for name, x in cotangents.items() if not isinstance(x, SymbolicZero)}
    order, blocks = _order(tokens.chosen, program.width)
    cotangents = {name: _pick(x, order) for name, x in cotangents.items()}
    (live, still), (live_pools, _) = _parted(constants, moving.constants), _parted(pools, moving.pools)

    def add(index: Array, sums: tuple[list[Array], list[Array]]):
        block = _block(program.width, order, index, pools, tokens)
        before, pulled = (_columns(tree, index, program.width) for tree in (known, cotangents))
        live_states, still_states = _parted(block.states, moving.pools)

        def scores(live: list[Array], live_states: list[Array]) -> Found:
            of_heads, _, of_again = program.structure.unflatten(_joined(live, still, moving.constants))
            states = _joined(live_states, still_states, moving.pools)
            logits = tuple(head(own, x) for head, own, x in zip(program.heads, of_heads, states))
            found = program.again(of_again, logits, block.arrays, before)
            return {name: found[name] for name in pulled}

        _, pull = jax.vjp(scores, live, live_states)
        of_live, of_states = pull({name: _only(x, block.real) for name, x in pulled.items()})
        of_states = [_only(x, block.real) for x in of_states]
        places = _parted(block.at, moving.pools)[0]
        return (
            [total + x.astype(total.dtype) for total, x in zip(sums[0], of_live)],
            [_scatter_add(*args) for args in zip(sums[1], places, of_states)],
        )

    sums = [jnp.zeros(x.shape, jnp.float32) for x in live], [jnp.zeros_like(x) for x in live_pools]
    if cotangents:
        sums = jax.lax.fori_loop(0, blocks, add, sums)
    of_live = [x.astype(leaf.dtype) for x, leaf in zip(sums[0], live)]
    return _joined(of_live, None, moving.constants), _joined(sums[1], None, moving.pools), None


_run.defvjp(_forward, _backward, symbolic_zeros=True)


class _Block(NamedTuple):
    states: list[Array]  # [R, n, D] of each side
    at: list[Array]  # [R, n], where these are in the pools
    arrays: tuple[Array | None, ...]
    real: Array  # [R, n], False behind a row's last token


def _block(width: int, order: Array, index: Array, pools: list[Array], tokens: _Tokens) -> _Block:
    own = jax.lax.dynamic_slice_in_dim(order, index * width, width, axis=1)
    real = own < tokens.chosen.shape[1]
    at = [_pick(x, own) for x in tokens.at]
    # what lies behind the last token, NaN included, must reach nothing
    states = [_only(_pick(pool, places), real) for pool, places in zip(pools, at)]
    return _Block(states, at, jax.tree.map(lambda x: _only(_pick(x, own), real), tokens.arrays), real)


def _order(chosen: Bool[Array, "R N"], width: int) -> tuple[Int[Array, "R P"], Int[Array, ""]]:
    """The columns of each row's chosen tokens, N behind them, in whole blocks; how many blocks hold any."""
    count = chosen.shape[1]
    order = jnp.sort(jnp.where(chosen, jnp.arange(count)[None], count), axis=1)
    order = jnp.pad(order, ((0, 0), (0, -count % width)), constant_values=count)
    most = jnp.max(jnp.sum(chosen, axis=1, dtype=jnp.int32))
    return order, (most + width - 1) // width


def _aligned(compact: Found, chosen: Bool[Array, "R N"]) -> Found:
    """What stands one after the other, each where its token is."""
    rank = jnp.cumsum(chosen, axis=1, dtype=jnp.int32) - 1
    return {name: _only(_pick(x, rank), chosen) for name, x in compact.items()}


def _explicit(function: Callable, *examples: Any) -> tuple[Callable, list[Any], Any]:
    """`function` with what it closes over as its first argument, that, and the shapes of what it gives."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
    structure = jax.tree.structure(shapes)

    def explicit(constants: list[Any], *args: Any) -> Any:
        found = jaxpr_as_fun(closed.replace(consts=constants))(*jax.tree.leaves(args))
        return structure.unflatten(found)

    return explicit, list(closed.consts), shapes


def _front(tree: Any, size: tuple[int, int]) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*size, *x.shape[2:]), x.dtype), tree)


def _columns(tree: Found, index: Array, width: int) -> Found:
    return {name: jax.lax.dynamic_slice_in_dim(x, index * width, width, axis=1) for name, x in tree.items()}


def _pick(x: Shaped[Array, "R N ..."], columns: Int[Array, "R P"]) -> Shaped[Array, "R P ..."]:
    columns = jnp.clip(columns, 0, x.shape[1] - 1)
    return jax.vmap(lambda row, own: row[own])(x, columns)


def _scatter_add(x: Array, columns: Array, values: Array) -> Array:
    return jax.vmap(lambda row, own, new: row.at[own].add(new))(x, columns, values)


def _only(x: Array, real: Array) -> Array:
    return jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def _parted(xs: Any, flags: tuple[bool, ...]) -> tuple[list, list]:
    return [x for x, yes in zip(xs, flags) if yes], [x for x, yes in zip(xs, flags) if not yes]


def _joined(ones: list, others: list | None, flags: tuple[bool, ...]) -> list:
    ones_left, others_left = iter(ones), iter(others or [])
    return [next(ones_left) if yes else None if others is None else next(others_left) for yes in flags]
