"""Advantages from several rewards of each sample: `advantages(rewards [B, G, R], weights [R], *, ...) -> [B, G]`.

A reward that is NaN (it says nothing of this answer) is left out; an answer without any is not scored, and its
advantage is 0.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.advantages._spread import centre, check_groups, deviation, divide
from alignax.advantages.group import group_relative
from alignax.types import Array, Scalar


def multi_reward_sum(
    rewards: Float[Array, "B G R"], weights: Float[Array, " R"], *, eps: Scalar = 1e-4, ddof: Scalar = 1
) -> Float[Array, "B G"]:
    """GRPO on a sum of rewards: (s - mean) / (std + eps), s = sum_k w_k r_k.

    The reward of the widest spread decides. See "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open
    Language Models", Shao et al. (https://arxiv.org/abs/2402.03300), section 4.1.2, for one reward.

    Args:
      rewards: `[B, G, R]`.
      weights: `[R]`, of each reward.
      eps, ddof: as for `group_relative`.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    rewards, weights, scored = _checked(rewards, weights, "multi_reward_sum")
    total = jnp.sum(jnp.where(jnp.isnan(rewards), 0.0, rewards * weights), axis=2)
    return group_relative(jnp.where(scored, total, jnp.nan), eps=eps, ddof=ddof)


def multi_reward_normalised(
    rewards: Float[Array, "B G R"], weights: Float[Array, " R"], *, eps: Scalar = 1e-4, ddof: Scalar = 1
) -> Float[Array, "B G"]:
    """GDPO, rewards normalised one by one: (a - mean) / (std + eps) over the batch, a = sum_k w_k group_relative(r_k).

    Answers that differ in one reward only stay apart, whatever the scales. See "GDPO: Group reward-Decoupled
    Normalization Policy Optimization for Multi-reward RL Optimization", Liu et al.
    (https://arxiv.org/abs/2601.05242). Take it over a whole rollout, before it is split.

    Args:
      rewards: `[B, G, R]`.
      weights: `[R]`, of each reward after it was normalised.
      eps, ddof: as for `group_relative`, in both divisions.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    rewards, weights, scored = _checked(rewards, weights, "multi_reward_normalised")
    each = jax.vmap(lambda one: group_relative(one, eps=eps, ddof=ddof), in_axes=2, out_axes=2)(rewards)
    total = jnp.where(scored, jnp.sum(each * weights, axis=2), jnp.nan)
    centred, there = centre(total.reshape(1, -1))
    return jax.lax.stop_gradient(divide(centred, deviation(centred, there, ddof), eps).reshape(total.shape))


def _checked(rewards: Array, weights: Array, name: str) -> tuple[Array, Array, Array]:
    """float32, the weights as [1, 1, R], and which samples have at least one reward."""
    chex.assert_rank([rewards, weights], [3, 1])
    chex.assert_shape(weights, (rewards.shape[2],))
    check_groups(rewards[:, :, 0], name)
    rewards, weights = rewards.astype(jnp.float32), weights.astype(jnp.float32)[None, None]
    return rewards, weights, jnp.any(~jnp.isnan(rewards), axis=2)
