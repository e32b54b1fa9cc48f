"""Advantages: from rewards (and values) to how much better than expected each token or sample was.

All results are constants to differentiation: a policy loss must never reach the critic or the reward through them.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Array,
    *,
    gamma: Scalar = 1.0,
    lambda_: Scalar = 0.95,
    bootstrap: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation over the masked-in tokens: A_t = delta_t + gamma lambda A_{t+1}.

    delta_t = r_t + gamma V_{t+1} - V_t, where t + 1 is the next masked-in token of the row: masked-out tokens, also
    in the middle (tool output), are skipped as if they were not there. See "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", Schulman et al. (https://arxiv.org/abs/1506.02438), eq. 16.

    Args:
      rewards: `[B, T]`, the reward for emitting each token.
      values: `[B, T]`, the value of the state before each token.
      mask: `[B, T]`, the tokens the policy chose.
      gamma: discount (paper: gamma).
      lambda_: bias against variance (paper: lambda); 1 gives returns minus values, 0 the one-step error.
      bootstrap: `[B]`, the value of the state after the last token, for rows that were cut off and would have gone
        on; 0 where a row ended. None: every row ended.

    Returns:
      advantages and returns (advantages + values), `[B, T]`, 0 where masked out.
    """
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    mask = mask.astype(bool)
    rewards, values = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (rewards, values))
    after = jnp.zeros(rewards.shape[0]) if bootstrap is None else bootstrap.astype(jnp.float32)
    chex.assert_shape(after, (rewards.shape[0],))

    def backward(carry, column):
        reward, value, chosen = column
        next_advantage, next_value = carry
        advantage = reward + gamma * next_value - value + gamma * lambda_ * next_advantage
        carry = jnp.where(chosen, advantage, next_advantage), jnp.where(chosen, value, next_value)
        return carry, jnp.where(chosen, advantage, 0.0)

    columns = (rewards.T, values.T, mask.T)
    _, advantages = jax.lax.scan(backward, (jnp.zeros_like(after), after), columns, reverse=True)
    advantages = advantages.T
    return jax.lax.stop_gradient((advantages, jnp.where(mask, advantages + values, 0.0)))


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
