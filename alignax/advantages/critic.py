"""Advantages of tokens from a critic."""

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
    """GAE, generalised advantage estimation: A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    t + 1 is the next masked-in token of the row: masked-out tokens, also
    in the middle (tool output), are skipped as if they were not there. See "High-Dimensional Continuous Control Using
    Generalized Advantage Estimation", Schulman et al. (https://arxiv.org/abs/1506.02438), eq. 16. TRL and
    lm-human-preferences do not skip: with a mask of ones it is theirs.

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
