"""Losses of process reward models, which judge every step of a solution: `loss(logits, labels, mask) -> [B, T]`."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check
from alignax.losses._logistic import binary_cross_entropy
from alignax.types import Array


def process_reward(logits: Float[Array, "B T"], labels: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Process reward model: -y log sigmoid(g) - (1 - y) log sigmoid(-g), at the last token of every step.

    Labels come from people or from completions of the steps so far (`alignax.rewards.monte_carlo_soft`). A model with
    two classes or two reward tokens has g = log p(right) - log p(wrong). See "Let's Verify Step by Step", Lightman et
    al. (https://arxiv.org/abs/2305.20050), and "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human
    Annotations", Wang et al. (https://arxiv.org/abs/2312.08935), eq. 2.

    Args:
      logits: `[B, T]`, the model's score at each token.
      labels: `[B, T]`, the probability that the step is right, in [0, 1], a constant.
      mask: `[B, T]`, the last tokens of the steps that are labelled.

    Raises:
      ValueError: for a label known to lie outside [0, 1].
    """
    arrays = (logits, labels, mask)
    chex.assert_rank(arrays, 2)
    chex.assert_equal_shape(arrays)
    chosen = mask != 0
    logits = jnp.where(chosen, logits.astype(jnp.float32), 0.0)
    labels = jnp.where(chosen, jax.lax.stop_gradient(labels.astype(jnp.float32)), 0.0)
    check("process_reward", "labels", labels, lambda x: (x >= 0) & (x <= 1), "0 <= labels <= 1")
    return jnp.where(chosen, binary_cross_entropy(logits, labels), 0.0)
