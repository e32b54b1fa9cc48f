"""Advantages of tokens from rewards of the steps that they belong to."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.advantages._spread import check_groups
from alignax.advantages.group import group_relative
from alignax.types import Array, Scalar


def group_relative_process(
    rewards: Float[Array, "B G S"],
    ends: Int[Array, "B G S"],
    mask: Array,
    *,
    eps: Scalar = 1e-4,
    ddof: Scalar = 1,
) -> Float[Array, "B G T"]:
    """GRPO, process supervision: A_t = sum of (r_k - mean) / (std + eps) over the steps k that end at t or later.

    Mean and standard deviation are those of all steps of all answers to the prompt. See "DeepSeekMath: Pushing the
    Limits of Mathematical Reasoning in Open Language Models", Shao et al. (https://arxiv.org/abs/2402.03300), section
    4.1.3. Answers of fewer steps than S, or of none, fill up with NaN.

    Args:
      rewards: `[B, G, S]`, of each step, NaN where there is none (or it could not be scored).
      ends: `[B, G, S]`, the column of each step's last token (paper: index(j)).
      mask: `[B, G, T]`, the tokens the policy chose.
      eps, ddof: as for `group_relative`.

    Returns:
      `[B, G, T]`, 0 where masked out.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    chex.assert_rank([rewards, ends, mask], 3)
    chex.assert_equal_shape([rewards, ends])
    chex.assert_equal_shape_prefix([rewards, mask], 2)
    check_groups(rewards[:, :, 0], "group_relative_process")
    steps = group_relative(rewards.reshape(len(rewards), -1), eps=eps, ddof=ddof).reshape(rewards.shape)
    ahead = ends[..., None] >= jnp.arange(mask.shape[2])[None, None, None]  # [B, G, S, T], folded into the sum
    return jax.lax.stop_gradient(jnp.where(mask != 0, jnp.sum(jnp.where(ahead, steps[..., None], 0.0), axis=2), 0.0))
