"""Pairwise losses of distributions: what is chosen should be better at every quantile of the batch.

The batch is the sample that its quantiles are of, so these look at all rows at once: they are refused micro-batches,
and take the rows' `weights` to leave fillers out. Notation as in `alignax.losses.preference`, without its `divergence`:
sorts and differences are of raw log-probabilities.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._logistic import smoothed_logistic
from alignax.losses._sides import check_sides, log_ratios
from alignax.losses.extras import whole_batch
from alignax.types import Array, Response, Scalar


@whole_batch
def aot(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.01,
    label_smoothing: Scalar = 0.0,
    weights: Array | None = None,
) -> Float[Array, " B"]:
    """AOT over pairs: -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d), d = sort(margins) - sort(ref margins).

    The policy's margins (chosen less rejected log-probability) should dominate the reference's, as distributions over
    the batch. See "Distributional Preference Alignment of LLMs via Optimal Transport", Melnyk et al.
    (https://arxiv.org/abs/2406.05882).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5).
      weights: `[B]`; rows of weight 0 stay out of both sorts; None for all in.

    Returns:
      `[B]`: each row has the loss of the quantile where its policy margin stands, 0 where its weight is 0.

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    check_sides(chosen, rejected)
    margin, ref_margin = chosen.sum - rejected.sum, chosen.ref_sum - rejected.ref_sum
    return _dominance("aot", margin, ref_margin, beta, label_smoothing, weights)


@whole_batch
def aot_unpaired(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.01,
    label_smoothing: Scalar = 0.0,
    weights: Array | None = None,
) -> Float[Array, " B"]:
    """AOT unpaired: -(1 - eps) log sigmoid(beta d) - eps log sigmoid(-beta d), d = sort(x_chosen) - sort(x_rejected).

    The log-ratios of chosen answers should dominate those of rejected ones, whichever prompts they answer: TRL's
    "aot_pair" before its version 0.28. See "Distributional Preference Alignment of LLMs via Optimal Transport", Melnyk
    et al. (https://arxiv.org/abs/2406.05882).

    Args:
      chosen, rejected: the two sides; a row of one need not belong to the same row of the other.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5).
      weights: `[B]`; rows of weight 0 stay out of both sorts; None for all in.

    Returns:
      `[B]`: each row has the loss of the quantile where its chosen log-ratio stands, 0 where its weight is 0.

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    return _dominance("aot_unpaired", *log_ratios(chosen, rejected), beta, label_smoothing, weights)


def _dominance(loss: str, upper: Array, lower: Array, beta: Scalar, label_smoothing: Scalar, weights: Array | None):
    check_positive(loss, beta=beta)
    counts = jnp.ones(upper.shape, bool) if weights is None else weights != 0
    chex.assert_equal_shape([upper, counts])
    # In the order of rows and not of quantiles, so that a mean with the same weights counts the right ones.
    logit = beta * jnp.where(counts, upper - _same_quantile(upper, lower, counts), 0.0)
    return jnp.where(counts, smoothed_logistic(logit, label_smoothing, loss), 0.0)


def _same_quantile(x: Array, other: Array, counts: Array) -> Array:
    """For each row the entry of `other` whose rank is that of the row in `x`; rows that do not count rank last."""
    rank = jnp.argsort(jnp.argsort(jnp.where(counts, x, jnp.inf)))
    return jnp.where(counts, jnp.sort(jnp.where(counts, other, jnp.inf))[rank], 0.0)
