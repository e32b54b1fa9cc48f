"""Grouped-query attention over what a mask lets each token see, and the cache of keys and values.

Keys are stored as [B, KV, hd, S] and values as [B, KV, S, hd], the layouts the two matrix products read without a
transposition. The G = H / KV query heads of one key head are extra rows of its matrix product, so keys and values are
never repeated.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.types import Array

UNSEEN = -1e30  # finite: a row that sees nothing (padding) gets a uniform average, not NaN


class LayerCache(NamedTuple):
    """The keys and values of one layer for S slots of every row."""

    keys: Float[Array, "B KV hd S"]
    values: Float[Array, "B KV S hd"]


def attend(
    queries: Float[Array, "B T H hd"],
    cache: LayerCache,
    visible: Bool[Array, "B T S"],
    *,
    scalar: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """softmax(q k / sqrt(scalar)) v over the visible slots: softmax in float32, divided after the product with v.

    scalar: None: hd. softcap: a score s becomes c tanh(s / c) first, if c is given. See "Gemma 2: Improving Open
    Language Models at a Practical Size" (https://arxiv.org/abs/2408.00118), section 2.
    """
    batch, length, heads, width = queries.shape
    grouped = queries.reshape(batch, length, cache.keys.shape[1], -1, width).transpose(0, 2, 3, 1, 4)
    scores = _matmul(grouped.reshape(*cache.keys.shape[:2], -1, width), cache.keys)
    scores = scores.reshape(*grouped.shape[:-1], -1) * (width if scalar is None else scalar) ** -0.5
    scores = capped(scores, softcap)
    scores = jnp.where(visible[:, None, None], scores, UNSEEN)
    # The shift by the maximum cancels in the quotient, so its derivative is zero and need not be computed.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(cache.values.dtype).reshape(*cache.keys.shape[:2], -1, weights.shape[-1])
    mixed = (_matmul(weights, cache.values).reshape(grouped.shape) / total).astype(queries.dtype)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


def capped(x: Float[Array, "..."], softcap: float | None) -> Float[Array, "..."]:
    """c tanh(x / c), between -c and c; x itself when c is None."""
    return x if softcap is None else softcap * jnp.tanh(x / softcap)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def as_cache(keys: Float[Array, "B T KV hd"], values: Float[Array, "B T KV hd"]) -> LayerCache:
    """The keys and values of a row's own tokens in the layout of the cache."""
    return LayerCache(keys.transpose(0, 2, 3, 1), values.transpose(0, 2, 1, 3))


def write(
    cache: LayerCache,
    keys: Float[Array, "B T KV hd"],
    values: Float[Array, "B T KV hd"],
    slots: Int[Array, "B T"],
) -> LayerCache:
    """Puts token t of row r into slot `slots[r, t]`: a scatter, which happens in place when the cache is donated."""
    rows = jnp.arange(slots.shape[0])[:, None]
    dtype = cache.keys.dtype
    return LayerCache(
        cache.keys.at[rows, :, :, slots].set(keys.astype(dtype)),
        cache.values.at[rows, :, slots].set(values.astype(dtype)),
    )


def write_front(cache: LayerCache, own: LayerCache) -> LayerCache:
    """Puts T tokens into slots 0 ... T - 1 of every row: two contiguous copies, no scatter."""
    length = own.values.shape[2]
    return LayerCache(
        cache.keys.at[:, :, :, :length].set(own.keys.astype(cache.keys.dtype)),
        cache.values.at[:, :, :length].set(own.values.astype(cache.values.dtype)),
    )
