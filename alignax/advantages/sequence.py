"""Advantages of tokens from rewards to go, without a critic: a greedy baseline, or whitening over the batch.

A row with a NaN reward where the mask is on (an answer that could not be scored) takes no part, and its advantages are
0.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.advantages.critic import gae
from alignax.advantages.group import group_centred
from alignax.reduce import whiten
from alignax.types import Array, Scalar


def remax(rewards: Float[Array, "B T"], baseline: Float[Array, " B"], mask: Array) -> Float[Array, "B T"]:
    """ReMax: A_t = sum_{s >= t} r_s - b, b the reward of the greedy answer to the same prompt.

    See "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models", Li
    et al. (https://arxiv.org/abs/2310.10505).

    Args:
      rewards: `[B, T]`, the reward for emitting each token.
      baseline: `[B]`, of one greedy answer to each row's prompt; NaN takes the row out.
      mask: `[B, T]`, the tokens the policy chose.
    """
    chex.assert_shape(baseline, rewards.shape[:1])
    returns, chosen = _rewards_to_go(rewards, mask, 1.0)
    chosen = chosen & ~jnp.isnan(baseline)[:, None]
    return jax.lax.stop_gradient(jnp.where(chosen, returns - baseline.astype(jnp.float32)[:, None], 0.0))


def reinforce_plus_plus(
    rewards: Float[Array, "B T"], mask: Array, *, gamma: Scalar = 1.0, ddof: int = 1, eps: Scalar = 1e-8
) -> Float[Array, "B T"]:
    """REINFORCE++: (G_t - mean) / sqrt(var + eps) over all tokens of the batch, G_t = r_t + gamma G_{t+1}.

    See "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization", Hu et al.
    (https://arxiv.org/abs/2501.03262). The rewards usually hold a KL penalty, see `alignax.rewards.shaped_rewards`.
    Take it over a whole rollout, before it is split.

    Args:
      rewards: `[B, T]`, the reward for emitting each token.
      mask: `[B, T]`, the tokens the policy chose.
      gamma: discount (paper: gamma).
      ddof, eps: of `alignax.reduce.whiten`.
    """
    return jax.lax.stop_gradient(whiten(*_rewards_to_go(rewards, mask, gamma), ddof=ddof, eps=eps))


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "B G"], mask: Array, *, ddof: int = 1, eps: Scalar = 1e-8
) -> Float[Array, "B G T"]:
    """REINFORCE++ with a group's baseline: (a - mean) / sqrt(var + eps) over all tokens, a = r - mean of the group.

    A long answer weighs more in the mean. See "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global
    Advantage Normalization", Hu et al. (https://arxiv.org/abs/2501.03262). Take it over a whole rollout, before it is
    split.

    Args:
      rewards: `[B, G]`, NaN for an answer without one.
      mask: `[B, G, T]`, the tokens the policy chose.
      ddof, eps: of `alignax.reduce.whiten`.

    Returns:
      `[B, G, T]`, 0 where masked out.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    centred = group_centred(rewards)
    chex.assert_rank(mask, 3)
    chex.assert_equal_shape_prefix([rewards, mask], 2)
    chosen = ((mask != 0) & ~jnp.isnan(rewards)[:, :, None]).reshape(-1, mask.shape[2])
    spread = jnp.broadcast_to(centred.reshape(-1, 1), chosen.shape)
    return jax.lax.stop_gradient(whiten(spread, chosen, ddof=ddof, eps=eps).reshape(mask.shape))


def _rewards_to_go(rewards: Array, mask: Array, gamma: Scalar) -> tuple[Array, Array]:
    """Discounted rewards to go, and the tokens that count: those of rows that could be scored."""
    chex.assert_rank([rewards, mask], 2)
    chex.assert_equal_shape([rewards, mask])
    chosen = mask != 0
    chosen = chosen & ~jnp.any(chosen & jnp.isnan(rewards), axis=1, keepdims=True)
    return gae(rewards, jnp.zeros(rewards.shape), chosen, gamma=gamma, lambda_=1.0)[0], chosen
