"""Several reward models as one: `f(scores [M, B]) -> [B]`, scores of M models that differ in their seed. Constants.

Bring every model to mean 0 and standard deviation 1 on a fixed set before, or the one with the largest scores decides.
See "Reward Model Ensembles Help Mitigate Overoptimization", Coste et al. (https://arxiv.org/abs/2310.02743), section 4.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


def ensemble_mean(scores: Float[Array, "M B"]) -> Float[Array, " B"]:
    """Ensemble mean: mean_m s_m, which may still be high where a single model errs.

    Args:
      scores: `[M, B]`, of M reward models.
    """
    return jnp.mean(_constant(scores), axis=0)


def ensemble_min(scores: Float[Array, "M B"]) -> Float[Array, " B"]:
    """Worst case of an ensemble (WCO): min_m s_m; high only where all models agree that it is.

    Args:
      scores: `[M, B]`, of M reward models.
    """
    return jnp.min(_constant(scores), axis=0)


def ensemble_variance_penalised(
    scores: Float[Array, "M B"], *, penalty: Scalar = 0.5, ddof: int = 0
) -> Float[Array, " B"]:
    """Uncertainty-weighted ensemble (UWO): mean_m s_m - lambda var_m s_m.

    Args:
      scores: `[M, B]`, of M reward models; the variance of a single one is 0.
      penalty: what a unit of variance costs (paper: lambda; 0.5 for best-of-n, 0.1 for PPO).
      ddof: 0 divides the variance by M (the authors' best-of-n), 1 by M - 1 (their PPO).
    """
    scores = _constant(scores)
    return jnp.mean(scores, axis=0) - penalty * _variance(scores, ddof)


def ensemble_lower_bound(scores: Float[Array, "M B"], *, deviations: Scalar = 1.0, ddof: int = 1) -> Float[Array, " B"]:
    """Lower confidence bound of an ensemble: mean_m s_m - k std_m s_m.

    In the units of the scores, unlike a penalty on the variance.

    Args:
      scores: `[M, B]`, of M reward models; the deviation of a single one is 0.
      deviations: how many standard deviations below the mean (k).
      ddof: 1 divides the variance by M - 1, 0 by M.
    """
    scores = _constant(scores)
    return jnp.mean(scores, axis=0) - deviations * jnp.sqrt(_variance(scores, ddof))


def _constant(scores: Array) -> Array:
    chex.assert_rank(scores, 2)
    return jax.lax.stop_gradient(scores.astype(jnp.float32))


def _variance(scores: Array, ddof: int) -> Array:
    if ddof not in (0, 1):
        raise ValueError(f"ddof={ddof}; expected 0 or 1")
    spread = jnp.sum((scores - jnp.mean(scores, axis=0, keepdims=True)) ** 2, axis=0)
    return spread / max(scores.shape[0] - ddof, 1)  # a single model has no spread, and divides it by 1
