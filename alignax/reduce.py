"""Reductions of unreduced losses to `Mean(total, count)`, whitening, and what else looks at a whole batch at once.

Losses are `[B, T]` or `[B]` and know nothing of averages; which tokens weigh how much is a choice of its own, passed as
a function. Every reduction selects with `where` before it adds, so what stands under a mask, NaN included, reaches
neither the value nor the gradient. `weights [B]` are example weights: a filler row weighs 0 and is not counted.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

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


def variance(x: Float[Array, "B T"], mask: Array, *, ddof: int = 1) -> Float[Array, ""]:
    """sum(m (x - mean)^2) / (n - ddof) over the n masked-in entries; 0 for n <= ddof, which leaves no spread."""
    return _variance(*_centred(x, mask)[1:], ddof)


def explained_variance(values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Array) -> Float[Array, ""]:
    """1 - var(returns - values) / var(returns) over masked-in entries: 1 for a perfect critic, 0 for a constant one.

    0 where the returns do not differ. Over a whole rollout; parts do not add up.
    """
    chex.assert_equal_shape([values, returns, mask])
    total = variance(returns, mask, ddof=0)
    left = variance(returns.astype(jnp.float32) - values.astype(jnp.float32), mask, ddof=0)
    return jnp.where(total > 0, 1 - left / jnp.where(total > 0, total, 1.0), 0.0)


def centre(x: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """x - mean over all masked-in entries, 0 elsewhere: `whiten` without a division."""
    return _centred(x, mask)[1]


def whiten(
    x: Float[Array, "B T"], mask: Array, *, shift_mean: bool = True, ddof: int = 1, eps: Scalar = 1e-8
) -> Float[Array, "B T"]:
    """(x - mean) / sqrt(var + eps) over all masked-in entries, 0 elsewhere; `shift_mean=False` adds the mean back.

    `ddof` 1 is TRL's and verl's variance, 0 that of lm-human-preferences and OpenRLHF (whose max(var, eps) differs from
    var + eps by less than eps). With no spread to divide by (fewer than ddof + 1 entries) the variance is taken as 0.
    Whiten a whole rollout once, before it is split.
    """
    mean, centred, count = _centred(x, mask)
    whitened = centred * jax.lax.rsqrt(_variance(centred, count, ddof) + eps)
    return whitened if shift_mean else jnp.where(mask != 0, whitened + mean, 0.0)


def top_entropy(entropy: Float[Array, "B T"], mask: Array, *, fraction: Scalar = 0.2) -> Bool[Array, "B T"]:
    """The masked-in tokens of highest entropy, about `fraction` of them (all where they are equal): a mask to train on.

    Those at or above the quantile 1 - fraction, interpolated linearly. See "Beyond the 80/20 Rule: High-Entropy
    Minority Tokens Drive Effective Reinforcement Learning for LLM Reasoning", Wang et al.
    (https://arxiv.org/abs/2506.01939), eq. 6. Take it over a whole batch, before it is split.

    Args:
      entropy: `[B, T]`, of the policy at each token.
      mask: `[B, T]`, the tokens to choose from.
      fraction: in (0, 1] (paper: rho).
    """
    chex.assert_rank([entropy, mask], 2)
    chex.assert_equal_shape([entropy, mask])
    chosen = mask != 0
    ordered = jnp.sort(jnp.where(chosen, entropy.astype(jnp.float32), jnp.inf), axis=None)
    last = jnp.sum(chosen.astype(jnp.float32)) - 1
    # not (1 - fraction) * last, which at 0.4 rounds up past whole numbers, and then loses the token there
    position = jnp.maximum(last - fraction * last, 0.0)
    lower = jnp.floor(position).astype(jnp.int32)
    upper = jnp.minimum(lower + 1, jnp.maximum(last, 0.0).astype(jnp.int32))
    step = jnp.where(upper > lower, ordered[upper] - ordered[lower], 0.0)
    return chosen & (entropy >= ordered[lower] + (position - lower) * step)


def _centred(x: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The mean of the masked-in entries, the entries less the mean (0 elsewhere), and their number."""
    chex.assert_equal_shape([x, mask])
    mask = mask.astype(bool)
    x = x.astype(jnp.float32)
    # From the least entry up: equal entries, however large, then differ from their mean by exactly 0, where a rounded
    # mean would leave an ulp that a division by sqrt(eps) turns into something.
    least = jax.lax.stop_gradient(jnp.min(jnp.where(mask, x, jnp.inf)))
    x = jnp.where(mask, x - least, 0.0)
    count = jnp.sum(mask.astype(jnp.float32))
    mean = jnp.sum(x) / jnp.maximum(count, 1.0)
    return mean + least, jnp.where(mask, x - mean, 0.0), count


def _variance(centred: Array, count: Array, ddof: int) -> Array:
    return jnp.where(count > ddof, jnp.sum(centred**2) / jnp.maximum(count - ddof, 1.0), 0.0)


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
