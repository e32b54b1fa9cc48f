"""One score out of several aspects (helpful, honest, harmless): `f(scores [B, A], ...) -> [B]`. Constants.

A weighted sum is `scores @ weights`, the most cautious choice `scores.min(axis=1)`; Llama 2's rule is `llama2_scores`.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.reduce import whiten
from alignax.types import Array, Scalar


def lexicographic(first: Float[Array, " B"], second: Float[Array, " B"], *, threshold: Scalar) -> Float[Array, " B"]:
    """One aspect before another: first where first < threshold, else second.

    Safety overrides, and where it is good enough helpfulness decides.

    Args:
      first: `[B]`, of the aspect that comes first, safety as a rule.
      second: `[B]`, of the other, on the same scale.
      threshold: from where on the first aspect is good enough.
    """
    chex.assert_rank([first, second], 1)
    chex.assert_equal_shape([first, second])
    first, second = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (first, second))
    return jnp.where(first < threshold, first, second)


def gated(scores: Float[Array, "B A"], gates: Float[Array, "B A"]) -> Float[Array, " B"]:
    """Aspects weighed by the prompt: sum_a softmax(g)_a s_a.

    See "Interpretable Preferences via Multi-Objective Reward Modeling and Mixture-of-Experts", Wang et al.
    (https://arxiv.org/abs/2406.12845), section 3.2.

    Args:
      scores: `[B, A]`, of each aspect.
      gates: `[B, A]`, logits that a gating network reads off the prompt.
    """
    chex.assert_rank([scores, gates], 2)
    chex.assert_equal_shape([scores, gates])
    weights = jax.nn.softmax(gates.astype(jnp.float32), axis=-1)
    return jax.lax.stop_gradient(jnp.sum(weights * scores.astype(jnp.float32), axis=-1))


def whitened_sum(scores: Float[Array, "B A"], weights: Float[Array, " A"] | None = None) -> Float[Array, " B"]:
    """Aspects on one scale: sum_a w_a (s_a - mean_a) / std_a over the batch, so that no aspect counts by its units.

    Args:
      scores: `[B, A]`, of each aspect, over a whole batch. An aspect in which all rows agree adds 0.
      weights: `[A]`; all 1 when None.
    """
    chex.assert_rank(scores, 2)
    ones = jnp.ones((scores.shape[0], 1))
    white = jax.vmap(lambda x: whiten(x[:, None], ones)[:, 0], in_axes=1, out_axes=1)(scores.astype(jnp.float32))
    weights = jnp.ones(scores.shape[1]) if weights is None else weights.astype(jnp.float32)
    chex.assert_shape(weights, scores.shape[1:])
    return jax.lax.stop_gradient(jnp.sum(white * weights[None], axis=1))
