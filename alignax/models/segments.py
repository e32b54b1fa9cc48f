"""Who sees whom, and at which position: everything about packed rows and shared prompts, in three functions.

`segments [B, T]` is 0 for padding and k >= 1 for the k-th packed part of a row; `parents [B, T]` is, for each token,
the segment that its own one continues (0 for none), so that one prompt can serve many completions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from alignax.types import Array


def segment_positions(segments: Int[Array, "B T"], parents: Int[Array, "B T"] | None = None) -> Int[Array, "B T"]:
    """The index of each token in its own segment, counted on from the length of its parent; 0 on padding.

    Sorted by segment, a token's index is its distance from the first of its segment: no [T, T] array is made.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    ordered, origins = jax.lax.sort((segments, columns), num_keys=1)  # stable
    new = jnp.diff(ordered, axis=1, prepend=ordered[:, :1] - 1) != 0
    indices = columns - jax.lax.cummax(jnp.where(new, columns, 0), axis=1)
    _, positions = jax.lax.sort((origins, indices), num_keys=1)
    if parents is not None:
        first, after = (jax.vmap(partial(jnp.searchsorted, side=side))(ordered, parents) for side in ("left", "right"))
        positions += jnp.where(parents != 0, after - first, 0)
    return jnp.where(segments != 0, positions, 0)


def segment_visibility(segments: Int[Array, "B T"], parents: Int[Array, "B T"] | None = None) -> Bool[Array, "B T T"]:
    """[b, i, j]: token i sees j <= i when segments[j] == segments[i] or segments[j] == parents[i], never padding."""
    seen = _same(segments, segments)
    if parents is not None:
        seen |= _same(parents, segments)
    return seen & jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))[None]


def within_window(
    visible: Bool[Array, "B T S"],
    positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """What is left of `visible` for a token that sees its own position and the window - 1 before it (None: all).

    See "Mistral 7B", Jiang et al. (https://arxiv.org/abs/2310.06825), section 2.
    """
    if window is None:
        return visible
    return visible & (key_positions[:, None, :] > positions[:, :, None] - window)


def _same(left: Array, right: Array) -> Array:
    return (left[:, :, None] == right[:, None, :]) & (right != 0)[:, None, :]
