"""Reductions of unreduced losses to `Mean(total, count)`, and whitening.

Losses are `[B, T]` or `[B]` and know nothing of averages; which tokens weigh how much is a choice of its own, passed as
a function. Every reduction selects with `where` before it adds, so what stands under a mask, NaN included, reaches
neither the value nor the gradient. `weights [B]` are example weights: a filler row weighs 0 and is not counted.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Mean, Scalar


def token_mean(x: Float[Array, "B T"], mask: Array, weights: Array | None = None) -> Mean:
    """Mean over tokens: sum(w m x) / sum(w m). Long rows weigh more (DAPO, and supervised fine-tuning)."""
    weight = _token_weights(x, mask, weights)
    return Mean(_weighted_sum(x, weight), jnp.sum(weight))


def sequence_mean(x: Float[Array, "B T"], mask: Array, weights: Array | None = None) -> Mean:
    """Mean over non-empty rows of each row's token mean: every row weighs the same (GRPO as published)."""
    weight = _token_weights(x, mask, weights)
    length = jnp.sum((mask != 0).astype(jnp.float32), axis=1, keepdims=True)
    return Mean(_weighted_sum(x, weight / jnp.maximum(length, 1.0)), _row_count(mask, weights))


def sequence_sum(x: Float[Array, "B T"], mask: Array, weights: Array | None = None) -> Mean:
    """Mean over non-empty rows of each row's sum (REINFORCE on whole sequences)."""
    return Mean(_weighted_sum(x, _token_weights(x, mask, weights)), _row_count(mask, weights))


def constant_mean(x: Float[Array, "B T"], mask: Array, weights: Array | None = None, *, constant: Scalar) -> Mean:
    """sum(w m x) / (constant * sum(w)): no row's length enters (Dr. GRPO; `constant` is the longest completion).

    Every row counts here, also one whose mask is empty.
    """
    weight = _token_weights(x, mask, weights)
    rows = jnp.asarray(float(x.shape[0])) if weights is None else jnp.sum(weights.astype(jnp.float32))
    return Mean(_weighted_sum(x, weight) / constant, rows)


def batch_mean(x: Float[Array, " B"], weights: Array | None = None) -> Mean:
    """Mean over rows of a loss that has one value per row: sum(w x) / sum(w)."""
    chex.assert_rank(x, 1)
    weight = jnp.ones(x.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    chex.assert_equal_shape([x, weight])
    return Mean(_weighted_sum(x, weight), jnp.sum(weight))


def whiten(
    x: Float[Array, "B T"], mask: Array, *, shift_mean: bool = True, ddof: int = 1, eps: Scalar = 1e-8
) -> Float[Array, "B T"]:
    """(x - mean) / sqrt(var + eps) over all masked-in entries, 0 elsewhere; `shift_mean=False` adds the mean back.

    `ddof` 1 is TRL's and verl's variance, 0 that of lm-human-preferences and OpenRLHF. With no spread to divide by
    (fewer than ddof + 1 entries) the variance is taken as 0. Whiten a whole rollout once, before it is split.
    """
    chex.assert_equal_shape([x, mask])
    mask = mask.astype(bool)
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    count = jnp.sum(mask.astype(jnp.float32))
    mean = jnp.sum(x) / jnp.maximum(count, 1.0)
    centred = jnp.where(mask, x - mean, 0.0)
    variance = jnp.where(count > ddof, jnp.sum(centred**2) / jnp.maximum(count - ddof, 1.0), 0.0)
    whitened = centred * jax.lax.rsqrt(variance + eps)
    return whitened if shift_mean else jnp.where(mask, whitened + mean, 0.0)


def _token_weights(x: Array, mask: Array, weights: Array | None) -> Float[Array, "B T"]:
    chex.assert_rank([x, mask], 2)
    chex.assert_equal_shape([x, mask])
    weight = (mask != 0).astype(jnp.float32)
    if weights is None:
        return weight
    chex.assert_shape(weights, (x.shape[0],))
    return weight * weights.astype(jnp.float32)[:, None]


def _row_count(mask: Array, weights: Array | None) -> Array:
    row = jnp.any(mask != 0, axis=1).astype(jnp.float32)
    return jnp.sum(row if weights is None else row * weights.astype(jnp.float32))


def _weighted_sum(x: Array, weight: Array) -> Array:
    return jnp.sum(jnp.where(weight != 0, x.astype(jnp.float32), 0.0) * weight)
