"""Beta-DPO: beta follows how far the gaps of this batch lie above their running mean, and outliers are left out.

Gaps are D = x_chosen - x_rejected, the margins of DPO without beta. A step: gaps of the whole batch without gradient;
`beta_dpo_moments` moves the running mean and standard deviation; `beta_dpo_select` weighs the pairs; then `beta_dpo` of
every pair, its mean under those weights.
"""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from alignax.losses._checks import check, check_positive
from alignax.losses._sides import log_ratios
from alignax.types import Array, Response, Scalar


def beta_dpo(
    chosen: Response,
    rejected: Response,
    *,
    gap_mean: Scalar,
    selected_mean: Scalar,
    beta: Scalar = 0.1,
    alpha: Scalar = 0.6,
) -> Float[Array, " B"]:
    """Beta-DPO: -log sigmoid(beta' D), beta' = max(0.001, beta (1 + alpha (selected_mean - gap_mean))), a constant.

    Pairs that lie far apart are learned cautiously, close ones boldly. See "beta-DPO: Direct Preference Optimization
    with Dynamic beta", Wu et al. (https://arxiv.org/abs/2407.08639).

    Args:
      chosen, rejected: the two sides.
      gap_mean: running mean of the gaps, this batch included (`beta_dpo_moments`; paper: M_0).
      selected_mean: mean gap of the pairs that `beta_dpo_select` left in this whole batch.
      beta: what is scaled, how strongly the reference holds (paper: beta_0).
      alpha: how far beta follows, 0 for DPO (paper: alpha).

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("beta_dpo", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    return -jax.nn.log_sigmoid(dynamic_beta(gap_mean, selected_mean, beta=beta, alpha=alpha) * (x_chosen - x_rejected))


def dynamic_beta(gap_mean: Scalar, selected_mean: Scalar, *, beta: Scalar, alpha: Scalar) -> Array:
    """max(0.001, beta (1 + alpha (selected_mean - gap_mean))), the beta of this batch, a constant."""
    chex.assert_rank([gap_mean, selected_mean], 0)
    return jax.lax.stop_gradient(jnp.maximum(1e-3, beta * (1 + alpha * (selected_mean - gap_mean))))


def beta_dpo_moments(
    mean: Scalar,
    std: Scalar,
    gaps: Float[Array, " B"],
    weights: Float[Array, " B"] | None = None,
    *,
    momentum: Scalar = 0.9,
) -> tuple[Array, Array]:
    """Beta-DPO, running moments: m <- g m + (1 - g) mean(D), s <- g s + (1 - g) std(D), with n - 1 below the variance.

    Of a whole batch; without a pair that weighs anything they stay, and one pair has a spread of 0. See "beta-DPO:
    Direct Preference Optimization with Dynamic beta", Wu et al. (https://arxiv.org/abs/2407.08639).

    Args:
      mean, std: as they were, 0 at first.
      gaps: `[B]`, constants.
      weights: `[B]`, pair weights; None for 1.
      momentum: in [0, 1) (paper: m; the authors' code: gamma).

    Raises:
      ValueError: for a momentum known to lie outside [0, 1).
    """
    check("beta_dpo_moments", "momentum", momentum, lambda x: (x >= 0) & (x < 1), "0 <= momentum < 1")
    gaps, weights = _constants(gaps, weights)
    count = jnp.sum(weights)
    average = jnp.sum(weights * gaps) / jnp.where(count > 0, count, 1.0)
    squares = jnp.sum(weights * (gaps - average) ** 2)
    spread = jnp.sqrt(squares / jnp.where(count > 1, count - 1, jnp.inf))
    rate = jnp.where(count > 0, 1 - momentum, 0.0)
    return mean + rate * (average - mean), std + rate * (spread - std)


def beta_dpo_select(
    key: Array,
    gaps: Float[Array, " B"],
    weights: Float[Array, " B"] | None = None,
    *,
    mean: Scalar,
    std: Scalar,
    ratio: float = 0.2,
) -> Float[Array, " B"]:
    """Beta-DPO, filter: floor(N (1 - ratio)) of N pairs, drawn without replacement by e^(-((D - mean) / std)^2 / 2).

    The largest of log-weight plus Gumbel noise are such a draw. See "beta-DPO: Direct Preference Optimization with
    Dynamic beta", Wu et al. (https://arxiv.org/abs/2407.08639).

    Args:
      key: is consumed.
      gaps: `[B]`, constants.
      weights: `[B]`, pair weights; pairs of weight 0 are not among the N. None for 1.
      mean, std: running moments of the gaps, this batch included; a std below 1e-6 counts as 1e-6.
      ratio: share of the pairs left out, in [0, 1), static (paper: rho).

    Returns:
      `[B]`: the weights of the pairs drawn, 0 elsewhere.

    Raises:
      ValueError: for a ratio outside [0, 1).
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"beta_dpo_select: ratio={ratio}; expected 0 <= ratio < 1")
    gaps, weights = _constants(gaps, weights)
    score = log_weight(gaps, mean, std) + jax.random.gumbel(key, gaps.shape)
    rank = jnp.argsort(jnp.argsort(-jnp.where(weights > 0, score, -jnp.inf)))
    # by number of pairs, in Python's floats: 10 (1 - 0.9) is 1, whatever rounding makes of it
    kept = jnp.asarray(np.array([math.floor(n * (1 - ratio) + 1e-9) for n in range(gaps.shape[0] + 1)]))
    return jnp.where(rank < kept[jnp.sum(weights > 0)], weights, 0.0)


def log_weight(gaps: Array, mean: Scalar, std: Scalar) -> Array:
    """-((D - mean) / std)^2 / 2: how likely a pair is to be drawn, up to a constant."""
    return -(((gaps - mean) / jnp.maximum(std, 1e-6)) ** 2) / 2


def _constants(gaps: Array, weights: Array | None) -> tuple[Array, Array]:
    """Both in float32, without gradient; a gap that weighs 0 is 0."""
    weights = jnp.ones(gaps.shape, jnp.float32) if weights is None else weights.astype(jnp.float32)
    chex.assert_rank([gaps, weights], 1)
    chex.assert_equal_shape([gaps, weights])
    return jax.lax.stop_gradient((jnp.where(weights > 0, gaps.astype(jnp.float32), 0.0), weights))
