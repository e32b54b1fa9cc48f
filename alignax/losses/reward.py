"""Losses of reward models over pairs: `loss(chosen, rejected, *, ...) -> [B]`, of one score for each side.

A score has no zero of its own: adding a constant to every score of a prompt changes no preference. `reward_centering`
fixes the constant.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


def bradley_terry(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | Scalar = 0.0,
    preference: Float[Array, " B"] | Scalar = 1.0,
) -> Float[Array, " B"]:
    """Bradley-Terry likelihood of a preference: -p log sigmoid(d - m) - (1 - p) log sigmoid(m - d).

    d = chosen - rejected. See "Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons", Bradley
    and Terry (https://doi.org/10.2307/2334029), and "Training language models to follow instructions with human
    feedback", Ouyang et al. (https://arxiv.org/abs/2203.02155), eq. 1. The margin is that of "Llama 2: Open Foundation
    and Fine-Tuned Chat Models", Touvron et al. (https://arxiv.org/abs/2307.09288), eq. 2.

    Args:
      chosen, rejected: `[B]`, the scores.
      margin: `[B]` or one number, how far apart the scores should be at least (paper: m(r), 1 for "significantly
        better" down to 0 for "negligibly better", or three times that).
      preference: `[B]` or one number in [0, 1], the probability that the chosen side is the preferred one: a share of
        annotators, or 1 - eps for labels that are wrong with probability eps; at 0.5 the pair is a tie.
    """
    chosen, rejected = _scores(chosen, rejected)
    for name, x in (("margin", margin), ("preference", preference)):
        if jnp.shape(x) not in ((), chosen.shape):
            raise ValueError(f"bradley_terry: {name} of shape {jnp.shape(x)}; expected a number or {chosen.shape}")
    # float32 also where margin or preference is an array of lower precision
    margin, preference = (jnp.asarray(x, jnp.float32) for x in (margin, preference))
    logit = chosen - rejected - margin
    return jax.nn.softplus(logit) - preference * logit


def reward_centering(chosen: Float[Array, " B"], rejected: Float[Array, " B"]) -> Float[Array, " B"]:
    """(chosen + rejected)^2: with a small weight beside `bradley_terry`, scores average 0 over the sides of a pair.

    See "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking", Eisenstein et al.
    (https://arxiv.org/abs/2312.09244), eq. 2; a weight of 0.01 is usual.

    Args:
      chosen, rejected: `[B]`, the scores.
    """
    chosen, rejected = _scores(chosen, rejected)
    return (chosen + rejected) ** 2


def _scores(chosen: Array, rejected: Array) -> tuple[Array, Array]:
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return chosen.astype(jnp.float32), rejected.astype(jnp.float32)
