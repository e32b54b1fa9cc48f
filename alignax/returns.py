"""Returns: what critics learn, and V-trace, from the rewards and values of masked-in tokens.

Everything is aligned as in `alignax.advantages.gae`, whose second result is the lambda-return: `values[:, t]` is the
value of the state before token t, t + 1 the next masked-in token of the row, `bootstrap [B]` the value of the state
after the last one (None: every row ended, 0). All results are constants to differentiation.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.advantages import gae
from alignax.losses._checks import check
from alignax.losses._ratios import exp
from alignax.types import LEAST_LOGP, Array, Scalar


def discounted_returns(rewards: Float[Array, "B T"], mask: Array, *, gamma: Scalar = 1.0) -> Float[Array, "B T"]:
    """Discounted returns: G_t = r_t + gamma G_{t+1}, rewards to go, without a critic.

    See "Reinforcement Learning: An Introduction", Sutton and Barto (http://incompleteideas.net/book/the-book-2nd.html),
    section 3.3.

    Args:
      rewards: `[B, T]`, the reward for emitting each token.
      mask: `[B, T]`, the tokens the policy chose.
      gamma: discount (paper: gamma).
    """
    return gae(rewards, jnp.zeros(rewards.shape), mask, gamma=gamma, lambda_=1.0)[1]


def lambda_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Array,
    *,
    gamma: Scalar = 1.0,
    lambda_: Scalar = 0.95,
    bootstrap: Float[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """Lambda returns: G_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda G_{t+1}), of one step at 0, to the end at 1.

    See "Reinforcement Learning: An Introduction", Sutton and Barto (http://incompleteideas.net/book/the-book-2nd.html),
    section 12.1. Generalised advantages are these less the values.

    Args:
      rewards, values, mask, gamma, lambda_, bootstrap: as for `alignax.advantages.gae`.
    """
    return gae(rewards, values, mask, gamma=gamma, lambda_=lambda_, bootstrap=bootstrap)[1]


def td_targets(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Array,
    *,
    gamma: Scalar = 1.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """TD targets: r_t + gamma V_{t+1}, the returns of one step.

    See "Reinforcement Learning: An Introduction", Sutton and Barto (http://incompleteideas.net/book/the-book-2nd.html),
    section 6.1.

    Args:
      rewards, values, mask, gamma, bootstrap: as for `alignax.advantages.gae`.
    """
    return n_step_returns(rewards, values, mask, n=1, gamma=gamma, bootstrap=bootstrap)


def n_step_returns(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Array,
    *,
    n: int | Array,
    gamma: Scalar = 1.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> Float[Array, "B T"]:
    """N-step returns: sum_{k<n} gamma^k r_{t+k} + gamma^n V_{t+n}.

    A row that ends sooner is bootstrapped where it ends. See "Reinforcement Learning: An Introduction", Sutton and
    Barto (http://incompleteideas.net/book/the-book-2nd.html), section 7.1.

    Args:
      rewards, values, mask, gamma, bootstrap: as for `alignax.advantages.gae`.
      n: how many rewards are counted, 1 or more.

    Raises:
      ValueError: for an n known to be below 1.
    """
    check("n_step_returns", "n", n, lambda n: n >= 1, "1 or more")
    rewards, values, mask, after = _checked(rewards, values, mask, bootstrap)
    length = rewards.shape[1]
    # the next masked-in column, `length` behind the last one, where the bootstrap stands
    own = jnp.where(mask, jnp.arange(length)[None, :], length)
    following = jax.lax.cummin(jnp.pad(own[:, 1:], ((0, 0), (0, 1)), constant_values=length), axis=1, reverse=True)

    def step(_, returns):
        padded = jnp.concatenate([returns, after[:, None]], axis=1)
        return rewards + gamma * jnp.take_along_axis(padded, following, axis=1)

    return jax.lax.stop_gradient(jnp.where(mask, jax.lax.fori_loop(0, n, step, values), 0.0))


def vtrace(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Array,
    *,
    gamma: Scalar = 1.0,
    lambda_: Scalar = 1.0,
    clip_rho: Scalar = 1.0,
    clip_c: Scalar = 1.0,
    clip_advantage: Scalar = 1.0,
    bootstrap: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """V-trace: v_t = V_t + min(clip_rho, rho_t) delta_t + gamma lambda min(clip_c, rho_t) (v_{t+1} - V_{t+1}), and A_t.

    Advantages and returns of one policy from the samples of another, delta_t = r_t + gamma V_{t+1} - V_t and

        A_t = min(clip_advantage, rho_t) (r_t + gamma ((1 - lambda) V_{t+1} + lambda v_{t+1}) - V_t)

    rho = exp(logp - old_logp). See "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner
    Architectures", Espeholt et al. (https://arxiv.org/abs/1802.01561), section 4.1; for lambda below 1, remark 2.

    Args:
      logp: `[B, T]` under the policy that is trained.
      old_logp: `[B, T]` under the policy that sampled.
      rewards, values, mask, gamma, bootstrap: as for `alignax.advantages.gae`.
      lambda_: bias against variance (paper: lambda).
      clip_rho: sets which policy's values v are (paper: rho bar).
      clip_c: how much of an error reaches back (paper: c bar).
      clip_advantage: of the advantage's own weight.

    Returns:
      advantages A and returns v, `[B, T]`, 0 where masked out.
    """
    chex.assert_equal_shape([logp, old_logp, rewards])
    rewards, values, mask, after = _checked(rewards, values, mask, bootstrap)
    logp, old_logp = (jnp.maximum(jnp.where(mask, x.astype(jnp.float32), 0.0), LEAST_LOGP) for x in (logp, old_logp))
    rho = exp(logp - old_logp)

    def backward(carry, column):
        rho, reward, value, chosen = column
        next_value, next_return = carry
        error = jnp.minimum(clip_rho, rho) * (reward + gamma * next_value - value)
        target = value + error + gamma * lambda_ * jnp.minimum(clip_c, rho) * (next_return - next_value)
        ahead = (1 - lambda_) * next_value + lambda_ * next_return
        advantage = jnp.minimum(clip_advantage, rho) * (reward + gamma * ahead - value)
        carry = jnp.where(chosen, value, next_value), jnp.where(chosen, target, next_return)
        return carry, (jnp.where(chosen, advantage, 0.0), jnp.where(chosen, target, 0.0))

    columns = (rho.T, rewards.T, values.T, mask.T)
    _, (advantages, returns) = jax.lax.scan(backward, (after, after), columns, reverse=True)
    return jax.lax.stop_gradient((advantages.T, returns.T))


def _checked(rewards: Array, values: Array, mask: Array, bootstrap: Array | None) -> tuple[Array, Array, Array, Array]:
    chex.assert_rank([rewards, values, mask], 2)
    chex.assert_equal_shape([rewards, values, mask])
    mask = mask.astype(bool)
    rewards, values = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (rewards, values))
    after = jnp.zeros(rewards.shape[0]) if bootstrap is None else bootstrap.astype(jnp.float32)
    chex.assert_shape(after, (rewards.shape[0],))
    return rewards, values, mask, after
