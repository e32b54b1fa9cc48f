"""Scores of steps: one score of a whole solution, `f(scores [B, S], mask) -> [B]`, and labels of steps. Constants.

A row without steps scores 0. See "Let's Verify Step by Step", Lightman et al. (https://arxiv.org/abs/2305.20050),
appendix F.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from alignax.types import Array, Scalar


def process_product(scores: Float[Array, "B S"], mask: Array) -> Float[Array, " B"]:
    """Product of the steps' scores: prod_k s_k, the probability that all steps are right.

    Args:
      scores: `[B, S]`, probabilities that each step is right.
      mask: `[B, S]`, which steps there are.
    """
    return _of_steps(scores, mask, 1.0, lambda x: jnp.prod(x, axis=1))


def process_min(scores: Float[Array, "B S"], mask: Array) -> Float[Array, " B"]:
    """Minimum of the steps' scores: min_k s_k; a solution is as good as its worst step.

    Args:
      scores: `[B, S]`, of each step.
      mask: `[B, S]`, which steps there are.
    """
    return _of_steps(scores, mask, jnp.inf, lambda x: jnp.min(x, axis=1))


def process_mean(scores: Float[Array, "B S"], mask: Array) -> Float[Array, " B"]:
    """Mean of the steps' scores: mean_k s_k.

    Args:
      scores: `[B, S]`, of each step.
      mask: `[B, S]`, which steps there are.
    """
    length = jnp.sum((mask != 0).astype(jnp.float32), axis=-1)
    return _of_steps(scores, mask, 0.0, lambda x: jnp.sum(x, axis=1) / jnp.maximum(length, 1.0))


def process_last(scores: Float[Array, "B S"], mask: Array) -> Float[Array, " B"]:
    """Score of the last step: s_K, of the step that has seen all others.

    Args:
      scores: `[B, S]`, of each step.
      mask: `[B, S]`, which steps there are.
    """
    last = scores.shape[-1] - 1 - jnp.argmax(jnp.flip(mask != 0, axis=-1), axis=-1)
    return _of_steps(scores, mask, 0.0, lambda x: jnp.take_along_axis(x, last[:, None], axis=1)[:, 0])


def monte_carlo_hard(correct: Bool[Array, "... N"]) -> Float[Array, "..."]:
    """Hard label of a step: 1 where any of the N completions from it reaches the right answer.

    See "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations", Wang et al.
    (https://arxiv.org/abs/2312.08935), eq. 3.

    Args:
      correct: `[..., N]`, which completions of the steps so far are right.
    """
    return jnp.any(correct != 0, axis=-1).astype(jnp.float32)


def monte_carlo_soft(correct: Bool[Array, "... N"]) -> Float[Array, "..."]:
    """Soft label of a step: the share of the N completions from it that reach the right answer.

    See "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations", Wang et al.
    (https://arxiv.org/abs/2312.08935), eq. 4.

    Args:
      correct: `[..., N]`, which completions of the steps so far are right.
    """
    return jnp.mean((correct != 0).astype(jnp.float32), axis=-1)


def rated_labels(
    ratings: Float[Array, "B S"], mask: Array, *, neutral: Scalar | None = 1.0
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Labels of rated steps: 0 for -1, 1 for 1, `neutral` for 0, and none after the first -1.

    The ratings are those of PRM800K.

    Args:
      ratings: `[B, S]`.
      mask: `[B, S]`, which steps were rated.
      neutral: the label of a step rated 0; None leaves it out.

    Returns:
      Labels and the mask of those that count, both `[B, S]`.
    """
    chex.assert_rank([ratings, mask], 2)
    chex.assert_equal_shape([ratings, mask])
    ratings = jnp.where(mask != 0, ratings.astype(jnp.float32), 0.0)
    wrong = (ratings < 0).astype(jnp.int32)
    counted = (mask != 0) & (jnp.cumsum(wrong, axis=1) - wrong == 0)
    if neutral is None:
        counted &= ratings != 0
    labels = jnp.where(ratings > 0, 1.0, jnp.where(ratings < 0, 0.0, 0.0 if neutral is None else neutral))
    return jnp.where(counted, labels, 0.0), counted


def _of_steps(scores: Array, mask: Array, nothing: float, combine) -> Array:
    chex.assert_rank([scores, mask], 2)
    chex.assert_equal_shape([scores, mask])
    chosen = mask != 0
    filled = jnp.where(chosen, jax.lax.stop_gradient(scores.astype(jnp.float32)), nothing)
    return jnp.where(jnp.any(chosen, axis=1), combine(filled), 0.0)
