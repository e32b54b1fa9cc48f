"""Advantages of samples from the others of their group: `advantages(rewards [B, G], *, ...) -> [B, G]`.

A reward that is NaN (an answer that could not be scored) takes no part, and its advantage is 0.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


def group_relative(rewards: Float[Array, "B G"], *, eps: Scalar = 1e-4, ddof: int = 1) -> Float[Array, "B G"]:
    """(r - mean) / (std + eps) within each prompt's group of G samples.

    A reward that is NaN (an answer that could not be scored) is left out of mean and standard deviation and its
    advantage is 0; so is that of every sample of a group without spread. See "DeepSeekMath: Pushing the Limits of
    Mathematical Reasoning in Open Language Models", Shao et al. (https://arxiv.org/abs/2402.03300), section 4.1.2.

    Raises:
      ValueError: for groups of one, which have no spread to compare with.
    """
    centred, scored = _centre(rewards, "group_relative")
    count = jnp.sum(scored, axis=1, keepdims=True, dtype=jnp.float32)
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(count - ddof, 1.0)
    return jax.lax.stop_gradient(centred / (jnp.sqrt(variance) + eps))


def group_centred(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """r - mean within each prompt's group of G samples, not divided: hard and easy prompts are not weighed up.

    See "Understanding R1-Zero-Like Training: A Critical Perspective", Liu et al. (https://arxiv.org/abs/2503.20783)
    (Dr. GRPO). NaN rewards and groups of one as in `group_relative`.
    """
    return jax.lax.stop_gradient(_centre(rewards, "group_centred")[0])


def _centre(rewards: Array, name: str) -> tuple[Array, Array]:
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"{name}: rewards of shape {rewards.shape}; expected [B, G] with at least 2 samples of each prompt (G)"
        )
    rewards = rewards.astype(jnp.float32)
    scored = ~jnp.isnan(rewards)
    # From the least reward up: large rewards that differ little keep their digits, and equal ones differ by exactly 0,
    # where a rounded mean would leave an ulp that a division by std + eps turns into an advantage.
    least = jnp.min(jnp.where(scored, rewards, jnp.inf), axis=1, keepdims=True)
    rewards = jnp.where(scored, rewards - least, 0.0)
    mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(jnp.sum(scored, axis=1, keepdims=True), 1)
    return jnp.where(scored, rewards - mean, 0.0), scored
