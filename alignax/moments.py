"""Running mean and variance, as arrays that can be jitted over and checkpointed: of all data, or of the recent past.

Both merge centred sums and never subtract large squares from each other, so that float32 is enough.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers seen so far."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  # float32 []
    mean: Array  # float32 []
    m2: Array  # float32 []

    @staticmethod
    def init() -> "Moments":
        """Of no numbers."""
        return Moments(*(jnp.zeros(()) for _ in range(3)))

    def variance(self, ddof: int = 1) -> Array:
        """m2 / (count - ddof), and 0 for fewer than ddof + 1 numbers, which have no spread."""
        return jnp.where(self.count > ddof, self.m2 / jnp.maximum(self.count - ddof, 1.0), 0.0)

    def std(self, ddof: int = 1) -> Array:
        """The square root of the variance. Floor it before you divide by it."""
        return jnp.sqrt(self.variance(ddof))


def update_moments(moments: Moments, x: Float[Array, " N"], weights: Array | None = None) -> Moments:
    """Running moments: count, mean and sum (x - mean)^2 of what was seen before and x together.

    See "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", Chan, Golub and LeVeque
    (Stanford STAN-CS-79-773), eq. 2.1.

    Args:
      moments: so far.
      x: `[N]`, new numbers.
      weights: `[N]`, how often each counts, 0 to leave it out. None: each once. NaN (a reward that could not be given)
        never counts.
    """
    chex.assert_rank(x, 1)
    weight = jnp.ones(x.shape) if weights is None else weights.astype(jnp.float32)
    chex.assert_equal_shape([x, weight])
    count, mean, m2 = _weighted(x, jnp.where(jnp.isnan(x), 0.0, weight))
    total = moments.count + count
    share = jnp.where(total > 0, count / jnp.where(total > 0, total, 1.0), 0.0)
    shift = mean - moments.mean
    merged = moments.m2 + m2 + shift**2 * moments.count * share
    return jax.lax.stop_gradient(Moments(total, moments.mean + share * shift, merged))


class ValueNorm(NamedTuple):
    """Mean and variance of returns, averaged over updates with weights that fall off into the past."""

    mean: Array  # float32 []
    variance: Array  # float32 []
    weight: Array  # float32 [], of all updates together: 0 before the first one, 1 in the end

    @staticmethod
    def init() -> "ValueNorm":
        """Before the first update, where normalising changes nothing."""
        return ValueNorm(*(jnp.zeros(()) for _ in range(3)))


def value_norm_update(
    norm: ValueNorm, returns: Float[Array, "B T"], mask: Array, *, beta: Scalar = 0.99995
) -> ValueNorm:
    """Value normalisation, update: beta old + (1 - beta) new, for mean and mean square of the returns, debiased.

    See "The Surprising Effectiveness of PPO in Cooperative, Multi-Agent Games", Yu et al.
    (https://arxiv.org/abs/2103.01955), value normalisation; ReaLHF's default for beta. A critic learns
    `normalise(norm, returns)` and its values are read through `denormalise`.

    Args:
      norm: so far.
      returns: `[B, T]`, in their own units.
      mask: `[B, T]`, the tokens that have one. An empty mask changes nothing.
      beta: how much of the past remains; 1 / (1 - beta) updates are remembered.
    """
    chex.assert_rank([returns, mask], 2)
    chex.assert_equal_shape([returns, mask])
    count, mean, m2 = _weighted(returns, (mask != 0).astype(jnp.float32))
    variance = m2 / jnp.maximum(count, 1.0)
    new = jnp.where(count > 0, 1.0 - jnp.asarray(beta, jnp.float32), 0.0)
    weight = (1 - new) * norm.weight + new
    share = jnp.where(weight > 0, new / jnp.where(weight > 0, weight, 1.0), 0.0)
    shift = mean - norm.mean
    # the mean square less the square of the mean, without forming either
    variance = (1 - share) * norm.variance + share * variance + share * (1 - share) * shift**2
    return jax.lax.stop_gradient(ValueNorm(norm.mean + share * shift, variance, weight))


def normalise(norm: ValueNorm, x: Array, *, eps: Scalar = 1e-5) -> Array:
    """Value normalisation: (x - mean) / sqrt(max(variance, eps)), x of any shape; x itself before the first update."""
    mean, std = _mean_std(norm, eps)
    return (x.astype(jnp.float32) - mean) / std


def denormalise(norm: ValueNorm, x: Array, *, eps: Scalar = 1e-5) -> Array:
    """Value normalisation, inverse: x sqrt(max(variance, eps)) + mean."""
    mean, std = _mean_std(norm, eps)
    return x.astype(jnp.float32) * std + mean


def _mean_std(norm: ValueNorm, eps: Scalar) -> tuple[Array, Array]:
    return norm.mean, jnp.where(norm.weight > 0, jnp.sqrt(jnp.maximum(norm.variance, eps)), 1.0)


def _weighted(x: Array, weight: Array) -> tuple[Array, Array, Array]:
    """Sum of the weights, weighted mean, weighted sum of squared deviations."""
    x = jnp.where(weight != 0, x.astype(jnp.float32), 0.0)
    count = jnp.sum(weight)
    mean = jnp.sum(weight * x) / jnp.where(count > 0, count, 1.0)
    return count, mean, jnp.sum(weight * (x - mean) ** 2)
