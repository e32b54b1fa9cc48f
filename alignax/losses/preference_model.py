"""Losses of pairwise preference models, which read both answers at once: `loss(..., preference) -> [B]`.

Such a model says how likely the first of two answers is preferred, and is not by itself indifferent to which one comes
first.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check
from alignax.losses._logistic import binary_cross_entropy
from alignax.types import Array


def preference_model(left: Array, right: Array, preference: Array) -> Array:
    """Pairwise preference model (PairRM): -p log sigmoid(left - right) - (1 - p) log sigmoid(right - left).

    The order of the two answers must be drawn at random for every row. See "LLM-Blender: Ensembling Large Language
    Models with Pairwise Ranking and Generative Fusion", Jiang et al. (https://arxiv.org/abs/2306.02561), section 3.

    Args:
      left, right: `[B]`, the scores that the model gives to the answers shown first and second; `[B, A]` for A aspects.
      preference: of the same shape, whether the first is preferred: a boolean or a probability in [0, 1], a constant.

    Raises:
      ValueError: for a preference known to lie outside [0, 1].
    """
    arrays = (left, right, preference)
    chex.assert_rank(arrays, {1, 2})
    chex.assert_equal_shape(arrays)
    return _likelihood("preference_model", left.astype(jnp.float32) - right.astype(jnp.float32), preference)


def symmetric_preference_model(
    logit: Float[Array, " B"], swapped_logit: Float[Array, " B"], preference: Array
) -> Float[Array, " B"]:
    """Pairwise preference model, both orders: the mean over the orders (1, 2) and (2, 1) of its likelihood.

    (l(a, p) + l(b, 1 - p)) / 2 with l(x, p) = -p log sigmoid(x) - (1 - p) log sigmoid(-x): every pair is learned in
    both orders, and swapping the answers and p changes nothing. See "LLM-Blender: Ensembling Large Language Models with
    Pairwise Ranking and Generative Fusion", Jiang et al. (https://arxiv.org/abs/2306.02561), section 3.

    Args:
      logit: `[B]`, of answer 1 being preferred when shown first (a).
      swapped_logit: `[B]`, of answer 2 being preferred when shown first (b).
      preference: `[B]`, whether answer 1 is preferred: a boolean or a probability in [0, 1], a constant (p).

    Raises:
      ValueError: for a preference known to lie outside [0, 1].
    """
    arrays = (logit, swapped_logit, preference)
    chex.assert_rank(arrays, 1)
    chex.assert_equal_shape(arrays)
    name = "symmetric_preference_model"
    first = _likelihood(name, logit.astype(jnp.float32), preference)
    second = _likelihood(name, swapped_logit.astype(jnp.float32), 1 - preference.astype(jnp.float32))
    return (first + second) / 2


def _likelihood(loss: str, logit: Array, preference: Array) -> Array:
    check(loss, "preference", preference, lambda x: (x >= 0) & (x <= 1), "0 <= preference <= 1")
    preference = jax.lax.stop_gradient(preference.astype(jnp.float32))
    return binary_cross_entropy(logit, preference)
