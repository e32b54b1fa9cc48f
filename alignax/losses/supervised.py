"""Supervised objectives: imitate given tokens."""

import chex
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array


def cross_entropy(logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Token cross-entropy -log p(token), 0 where masked out. The loss of supervised fine-tuning.

    Args:
      logp: `[B, T]`, log-probability of each token.
      mask: `[B, T]`, the tokens to learn.
    """
    chex.assert_rank([logp, mask], 2)
    chex.assert_equal_shape([logp, mask])
    return -jnp.where(mask != 0, logp.astype(jnp.float32), 0.0)
