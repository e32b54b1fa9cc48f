"""Policy losses over tokens: `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`, to be minimised.

`old_logp` and `advantages` are constants. The log-ratio is clipped to [-20, 20] before the exponential, so that no
token can overflow; a log-probability counts for no less than -1e4. Any of these goes with any advantage and any
reduction of `alignax.reduce`; `alignax.losses.sequence_policy` holds those whose ratio is a whole row's.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check, check_positive
from alignax.losses._ratios import clipped_surrogate, exp, policy_inputs
from alignax.losses.divergence import k3_forward
from alignax.types import Array, Scalar


def importance_ratio(logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Importance ratio of each token: r = exp(logp - old_logp), 0 where masked out.

    Differentiable in `logp`: times an estimator of KL(policy || reference) it makes value and gradient unbiased for
    samples of the old policy, see `alignax.algorithms.grpo` (`unbiased_kl`) and "DeepSeek-V3.2: Pushing the Frontier of
    Open Large Language Models", DeepSeek-AI (https://arxiv.org/abs/2512.02556), section 3.1.

    Args:
      logp, old_logp, mask: `[B, T]`, as for `ppo_clip`.
    """
    _, log_ratio, _ = policy_inputs(logp, old_logp, jnp.zeros_like(logp), mask)
    return jnp.where(mask != 0, exp(log_ratio), 0.0)


def reinforce(
    logp: Float[Array, "B T"], old_logp: Float[Array, "B T"], advantages: Float[Array, "B T"], mask: Array
) -> Float[Array, "B T"]:
    """REINFORCE: -A log pi(y_t). The return less a baseline is A.

    Its value says nothing; its gradient is that of the expected return, for one update on samples of this very policy.
    Baselines are advantages, see `alignax.advantages`. See "Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning", Williams (https://doi.org/10.1007/BF00992696). Published with
    `alignax.reduce.sequence_sum`; with the advantages of GPG (https://arxiv.org/abs/2504.02546) it is its loss.

    Args:
      logp: `[B, T]` under the policy that is trained.
      old_logp: `[B, T]`, not used: here because all policy losses take it.
      advantages: `[B, T]`.
      mask: `[B, T]`, the tokens the policy chose.
    """
    logp, _, advantages = policy_inputs(logp, old_logp, advantages, mask)
    return -advantages * logp


def reinforce_is_token(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    cap: Scalar = 2.0,
) -> Float[Array, "B T"]:
    """REINFORCE with truncated importance weights: -sg(min(r, cap)) A log pi(y_t), r = exp(logp - old_logp).

    The weight is a constant: differentiating it as well would add log pi times its gradient. `old_logp` is what the
    sampler said of its tokens, whatever made it differ. See "Off-Policy Actor-Critic", Degris et al.
    (https://arxiv.org/abs/1205.4839), for the weights and "Truncated Importance Sampling", Ionides
    (https://doi.org/10.1198/106186008X320456), for the cap. `reinforce_is_sequence` weighs whole rows.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      cap: the largest weight (paper: C).
    """
    check_positive("reinforce_is_token", cap=cap)
    logp, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    return -jax.lax.stop_gradient(jnp.minimum(exp(log_ratio), cap)) * advantages * logp


def a2c(
    logp: Float[Array, "B T"],
    values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    entropy: Float[Array, "B T"],
    mask: Array,
    *,
    value_weight: Scalar = 0.5,
    entropy_weight: Scalar = 0.01,
) -> Float[Array, "B T"]:
    """A2C, advantage actor-critic: -sg(R - V) log pi(y_t) + c_v (V - R)^2 / 2 - c_e H.

    Policy and critic at once, for one update on samples of this very policy; `alignax.algorithms.ppo.make_shared_loss`
    with `policy_loss=reinforce` is the same over a model. See "Asynchronous Methods for Deep Reinforcement Learning",
    Mnih et al. (https://arxiv.org/abs/1602.01783), section 4.

    Args:
      logp: `[B, T]` under the policy that is trained.
      values: `[B, T]` of the critic that is trained; the policy does not reach it.
      returns: `[B, T]`, what the values should be, a constant.
      entropy: `[B, T]`, of the policy at each token.
      mask: `[B, T]`, the tokens the policy chose.
      value_weight: of the critic's squared error (c_v).
      entropy_weight: of the entropy bonus (paper: beta; here c_e).
    """
    chex.assert_rank([values, returns, entropy, mask], 2)
    chex.assert_equal_shape([values, returns, entropy, mask])
    values, returns, entropy = (jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (values, returns, entropy))
    error = values - jax.lax.stop_gradient(returns)
    critic = value_weight / 2 * error**2
    return (reinforce(logp, logp, -error, mask) + critic) - entropy_weight * entropy


def ppo_clip(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
) -> Float[Array, "B T"]:
    """PPO, clipped surrogate: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp).

    See "Proximal Policy Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), eq. 7. Ranges of
    different width are DAPO's clip-higher (https://arxiv.org/abs/2503.14476). `dual_clip` bounds the loss of a bad
    token by -dual_clip A, however large its ratio: "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", Ye et al. (https://arxiv.org/abs/1912.09729), eq. 5. It is also the two-sided clipping of INTELLECT-2
    (https://arxiv.org/abs/2505.07291), TRL's `delta`: a cap on the ratio above 1 + clip_high binds nowhere else.
    Decoupled PPO (https://arxiv.org/abs/2110.00641) is this loss, its `old_logp` the trainer's before the update, times
    a weight from `alignax.corrections` for the policy that sampled.

    Args:
      logp: `[B, T]` under the policy that is trained.
      old_logp: `[B, T]` under the policy that sampled, by the trainer's arithmetic.
      advantages: `[B, T]`.
      mask: `[B, T]`, the tokens the policy chose.
      clip_low, clip_high: how far the ratio counts below and above 1 (paper: epsilon).
      dual_clip: c > 1, or None for none (3 is usual).

    Raises:
      ValueError: for a dual_clip known to be 1 or less.
    """
    if dual_clip is not None:
        check("ppo_clip", "dual_clip", dual_clip, lambda c: c > 1, "a number above 1, or None for none")
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    loss = clipped_surrogate(exp(log_ratio), advantages, clip_low, clip_high)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss


def ppo_penalty(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    kl_weight: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """PPO, penalised surrogate: -r A + kl_weight (r - 1 - log r), r = exp(logp - old_logp).

    The second summand estimates KL(old || new) from samples of the old policy (`k3_forward`). See "Proximal Policy
    Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), eq. 8;
    `alignax.controllers.ppo_paper_kl` adapts the weight as the paper does.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      kl_weight: how strongly the old policy holds (paper: beta).
    """
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    return -exp(log_ratio) * advantages + kl_weight * k3_forward(log_ratio, jnp.zeros_like(log_ratio), mask)


def ppo_hybrid(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    kl_weight: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """PPO, clipped and penalised: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_weight (r - 1 - log r).

    `ppo_clip` with the second summand of `ppo_penalty`: what the clip lets through is still held. See "Proximal Policy
    Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), sections 3 and 4.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      clip_low, clip_high: how far the ratio counts below and above 1 (paper: epsilon).
      kl_weight: how strongly the old policy holds (paper: beta).
    """
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    clipped = clipped_surrogate(exp(log_ratio), advantages, clip_low, clip_high)
    return clipped + kl_weight * k3_forward(log_ratio, jnp.zeros_like(log_ratio), mask)


def cispo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    ratio_max: Scalar = 5.0,
    ratio_min: Scalar = 0.0,
) -> Float[Array, "B T"]:
    """CISPO, clipped weights: -sg(clip(r, ratio_min, ratio_max)) A log pi(y_t), r = exp(logp - old_logp).

    The weight is clipped, not the update: no token loses its gradient, however rare it was. See "MiniMax-M1: Scaling
    Test-Time Compute Efficiently with Lightning Attention", MiniMax (https://arxiv.org/abs/2506.13585), eqs. 4 and 5,
    without a lower bound as there; the cap is tuned, 4 to 8 in "The Art of Scaling Reinforcement Learning Compute for
    LLMs", Khatri et al. (https://arxiv.org/abs/2510.13786), and absolute, as TRL's `epsilon_high`. verl's convention,
    clip(r, 1 - clip_low, 1 + clip_high), is `cispo_range`. Published with `alignax.reduce.token_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      ratio_max, ratio_min: the largest and the smallest weight (paper: 1 + epsilon_high, 1 - epsilon_low).

    Raises:
      ValueError: for a ratio_max known to be 0 or less.
    """
    check_positive("cispo", ratio_max=ratio_max)
    logp, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    return -jax.lax.stop_gradient(jnp.clip(exp(log_ratio), ratio_min, ratio_max)) * advantages * logp


def cispo_range(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
) -> Float[Array, "B T"]:
    """CISPO, verl's bounds: -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi(y_t), r = exp(logp - old_logp).

    See "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", MiniMax
    (https://arxiv.org/abs/2506.13585), eqs. 4 and 5.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      clip_low, clip_high: how far the weight may go below and above 1 (paper: epsilon).
    """
    return cispo(logp, old_logp, advantages, mask, ratio_min=1 - clip_low, ratio_max=1 + clip_high)


def sapo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    tau_positive: Scalar = 1.0,
    tau_negative: Scalar = 1.05,
) -> Float[Array, "B T"]:
    """SAPO, soft gate: -(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A, r = exp(logp - old_logp).

    The gate has slope 1 at r = 1, like the ratio itself, and flattens on both sides instead of breaking off. See "Soft
    Adaptive Policy Optimization", Gao et al. (https://arxiv.org/abs/2511.20347). Published with
    `alignax.reduce.sequence_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      tau_positive, tau_negative: how fast the gate closes for A > 0 and for all others (paper: tau_pos, tau_neg).

    Raises:
      ValueError: for a temperature known to be 0 or less.
    """
    check_positive("sapo", tau_positive=tau_positive, tau_negative=tau_negative)
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    return -4 / tau * jax.nn.sigmoid(tau * (exp(log_ratio) - 1)) * advantages
