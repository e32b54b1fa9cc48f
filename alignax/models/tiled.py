"""Attention of whole rows, a tile of queries at a time: XLA alone, no array of [T, T], any mask, differentiable.

Each tile computes its part of the mask from segments, parents and positions, and its backward pass computes its scores
again: "Self-attention Does Not Need O(n^2) Memory", Rabe and Staats (https://arxiv.org/abs/2112.05682), with all keys
that a tile may see in one piece.
"""

import itertools
import operator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from alignax.models import attention
from alignax.models.attention import LayerCache
from alignax.models.remat import named
from alignax.models.rows import Rows
from alignax.types import Array

SCORES = 2**18  # of one head in one tile
PARTS = 4  # of a row; the tiles of each are a loop over as many keys as the last one sees: 5/8 of all pairs, not 1/2


def attend(
    queries: Float[Array, "B T H hd"],
    cache: LayerCache,
    rows: Rows,
    *,
    window: int | None = None,
    scalar: float | None = None,
    softcap: float | None = None,
    size: int | None = None,
) -> Float[Array, "B T H hd"]:
    """`alignax.models.attention.attend` under the mask that `rows` and `window` describe.

    size: queries of a tile; None: so many that a tile has SCORES scores per head, at least 32 and at most 512.
    """
    length = queries.shape[1]
    size = min(length, max(32, min(512, SCORES // length)) if size is None else size)
    asking = (queries, rows.segments, rows.parents, rows.positions)
    starts = size * jnp.arange(-(-length // size))
    tiles = (starts, *(None if x is None else in_tiles(x, size) for x in asking))
    tile = partial(_tile, rows=rows, window=window, scalar=scalar, softcap=softcap)
    reach = None if window is None or rows.positions is not None else window + size - 1
    if reach is not None and 2 * reach <= length:
        mixed = jax.lax.map(_again(partial(_near, tile, cache, reach)), tiles)
    else:
        mixed = jnp.concatenate(
            [
                jax.lax.map(_again(partial(tile, _part(cache, 0, min(stop * size, length)), 0)), part)
                for stop, part in _in_parts(tiles)
            ]
        )
    return named(in_rows(mixed, length), "attended")


_again = partial(jax.checkpoint, prevent_cse=False)  # a loop already prevents it


def in_tiles(x: Shaped[Array, "B T ..."], size: int) -> Shaped[Array, "n B size ..."]:
    """The rows in tiles of `size` queries, filled up with zeros: queries of segment 0, which nobody asks for."""
    missing = [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)]
    return jnp.pad(x, missing).reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)


def in_rows(tiles: Shaped[Array, "n B size ..."], length: int) -> Shaped[Array, "B T ..."]:
    """The tiles as rows of `length` queries again."""
    return tiles.swapaxes(0, 1).reshape(tiles.shape[1], -1, *tiles.shape[3:])[:, :length]


def _in_parts(tiles: tuple) -> list[tuple[int, tuple]]:
    """The tiles in at most PARTS groups of neighbours, each after the number of tiles up to its end."""
    bounds = np.unique(np.linspace(0, len(tiles[0]), PARTS + 1).astype(int)).tolist()
    pieces = [slice(*piece) for piece in itertools.pairwise(bounds)]
    return [(piece.stop, jax.tree.map(operator.itemgetter(piece), tiles)) for piece in pieces]


def _part(cache: LayerCache, first: Array | int, slots: int) -> LayerCache:
    keys = jax.lax.dynamic_slice_in_dim(cache.keys, first, slots, axis=3)
    return LayerCache(keys, jax.lax.dynamic_slice_in_dim(cache.values, first, slots, axis=2))


def _near(tile, cache: LayerCache, reach: int, asking: tuple) -> Array:
    """A tile that sees the `reach` slots up to its end; the last one may be longer than the row."""
    slots = cache.values.shape[2]
    first = jnp.clip(asking[0] + asking[1].shape[1] - reach, 0, slots - reach)
    return tile(_part(cache, first, reach), first, asking)


def _tile(
    cache: LayerCache,
    first: Array | int,
    asking: tuple,
    *,
    rows: Rows,
    window: int | None,
    scalar: float | None,
    softcap: float | None,
) -> Float[Array, "B size H hd"]:
    """The queries of one tile over the slots from `first` on."""
    start, queries, *own = asking
    columns, slots = start + jnp.arange(queries.shape[1]), first + jnp.arange(cache.values.shape[2])
    other = [None if x is None else jax.lax.dynamic_slice_in_dim(x, first, len(slots), axis=1) for x in _keyed(rows)]
    return attention.attend(
        queries, cache, _visible(own, other, columns, slots, window), scalar=scalar, softcap=softcap
    )


def _keyed(rows: Rows) -> tuple[Array | None, Array | None]:
    return rows.segments, rows.positions


def _visible(
    own: list, other: list, columns: Int[Array, " size"], slots: Int[Array, " S"], window: int | None
) -> Bool[Array, "#B size S"]:
    """The mask of one tile; see `alignax.models.segments`, which has the whole of it."""
    (segments, parents, positions), (key_segments, key_positions) = own, other
    seen = slots[None, None, :] <= columns[None, :, None]
    if segments is not None:
        same = segments[:, :, None] == key_segments[:, None, :]
        if parents is not None:
            same |= parents[:, :, None] == key_segments[:, None, :]
        seen &= same & (key_segments != 0)[:, None, :]
    if window is None:
        return seen
    if positions is None:
        return seen & (slots[None, None, :] > columns[None, :, None] - window)
    return seen & (key_positions[:, None, :] > positions[:, :, None] - window)
