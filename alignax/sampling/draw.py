"""Randomness that belongs to the row: keys, uniform numbers and the draw of a token.

The numbers for a token are a function of (key, row id, column) alone, so a sample depends neither on the batch, the
order or the group it is drawn in, nor on whether its row was sampled in one go or continued from a part of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key, UInt

from alignax.types import Array

_BLOCK = 128
_SHARDS = 16
_LARGE = 32_768  # from here on the padding is little


def row_keys(key: Array, row_ids: Int[Array, " R"]) -> Array:
    """One key for each row, folded from the key and the row's id."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_ids)


def uniforms(keys: Key[Array, " R"] | UInt[Array, "R _"], columns: Int[Array, " R"]) -> Float[Array, "R 2"]:
    """Two numbers in [0, 1) for the token of each row at the given column."""
    return jax.vmap(lambda key, column: jax.random.uniform(jax.random.fold_in(key, column), (2,)))(keys, columns)


def categorical(
    gap: Float[Array, "R V"], limit: Float[Array, " R"], uniform: Float[Array, "R 2"]
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """A token of each row, with probability exp(-gap) / total among those with gap <= limit, and the total.

    The inverse of the cumulative distribution in two levels: the first number picks a block of 128 tokens by its
    weight, the second a token of the block. That is one pass over the vocabulary and no noise for each token of it,
    which Gumbel's way would need; and a number of its own resolves unlikely tokens better than what is left of the
    first. A token of weight 0 is never drawn; uniform = 0 gives the first token with a weight. A row without any
    (its logits are NaN) gives token 0.
    """
    rows, size = gap.shape
    # blocks of a large vocabulary divide among devices, so that where it is sharded each sums its own
    whole = _BLOCK * (_SHARDS if size >= _LARGE else 1)
    gap = jnp.pad(gap, ((0, 0), (0, -size % whole)), constant_values=jnp.inf).reshape(rows, -1, _BLOCK)
    weight = jnp.where(gap <= limit[:, None, None], jnp.exp(-gap), 0.0)
    blocks = jnp.sum(weight, axis=-1)
    block = _pick(blocks, uniform[:, 0])
    gap = jnp.take_along_axis(gap, block[:, None, None], axis=1)[:, 0]
    weight = jnp.where(gap <= limit[:, None], jnp.exp(-gap), 0.0)
    return block * _BLOCK + _pick(weight, uniform[:, 1]), jnp.sum(blocks, axis=-1)


def _pick(weight: Float[Array, "R N"], uniform: Float[Array, " R"]) -> Int[Array, " R"]:
    """The first index whose cumulative weight exceeds uniform * total, of those with a weight.

    A sum in another order may round so that none does, or that one without a weight does: hence the last with a weight
    as the upper bound, and the test for one.
    """
    cumulative = jnp.cumsum(weight, axis=-1)
    index = jnp.arange(weight.shape[-1], dtype=jnp.int32)[None]
    exceeds = (cumulative > (uniform * cumulative[:, -1])[:, None]) & (weight > 0)
    first = jnp.min(jnp.where(exceeds, index, weight.shape[-1]), axis=-1)
    last = jnp.max(jnp.where(weight > 0, index, 0), axis=-1)
    return jnp.minimum(first, last)
