"""Policy losses whose ratio is a whole response's: `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`.

A row's value stands on each of its tokens, so that `alignax.reduce.sequence_mean`, the mean over rows of token means,
is the published mean over responses. A row's advantage A is the mean over its tokens (all are equal where one reward
was given for the whole response); an empty row is 0. `old_logp` and `advantages` are constants; log-ratios of rows are
clipped to [-20, 20] before the exponential.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._ratios import clipped_surrogate, exp, policy_inputs, row_mean, row_sum
from alignax.types import Array, Scalar

LARGEST_MEAN = 10.0  # of an average log-ratio: as verl has it


def rloo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
) -> Float[Array, "B T"]:
    """RLOO, sequence ratio: -min(p A, clip(p, 1 - clip_low, 1 + clip_high) A), p = exp(sum_t(logp - old_logp)).

    A response is one action. Its advantage is the reward less the mean of its siblings' (`alignax.advantages`), the KL
    part of the reward. See "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs", Ahmadian et al. (https://arxiv.org/abs/2402.14740), whose one update per rollout has p = 1; the clip
    is TRL's, for more. Published with `alignax.reduce.sequence_mean`.

    Args:
      logp: `[B, T]` under the policy that is trained.
      old_logp: `[B, T]` under the policy that sampled, by the trainer's arithmetic.
      advantages: `[B, T]`.
      mask: `[B, T]`, the tokens the policy chose.
      clip_low, clip_high: how far the ratio counts below and above 1.
    """
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    loss = clipped_surrogate(exp(row_sum(log_ratio)), row_mean(advantages, mask), clip_low, clip_high)
    return jnp.where(mask != 0, loss, 0.0)


def reinforce_is_sequence(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    cap: Scalar = 2.0,
) -> Float[Array, "B T"]:
    """REINFORCE with truncated sequence weights: -sg(min(p, cap)) A_t log pi(y_t), p = exp(sum_t(logp - old_logp)).

    The weight of a whole response on each of its tokens, a constant; unbiased but for the cap, of a variance that grows
    with length. See "Off-Policy Actor-Critic", Degris et al. (https://arxiv.org/abs/1205.4839), for the weights and
    "Truncated Importance Sampling", Ionides (https://doi.org/10.1198/106186008X320456), for the cap. Published with
    `alignax.reduce.sequence_sum`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`; each token has its own advantage.
      cap: the largest weight (paper: C).
    """
    check_positive("reinforce_is_sequence", cap=cap)
    logp, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    return -jax.lax.stop_gradient(jnp.minimum(exp(row_sum(log_ratio)), cap)) * advantages * logp


def gspo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 3e-4,
    clip_high: Scalar = 4e-4,
) -> Float[Array, "B T"]:
    """GSPO, average log-ratio: -min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s = exp(mean_t(logp - old_logp)).

    The unit of clipping is that of the reward: a whole response. The ranges are this small because an average moves so
    little. See "Group Sequence Policy Optimization", Zheng et al. (https://arxiv.org/abs/2507.18071), eqs. 5 and 7; log
    s is clipped to [-20, 10]. Published with `alignax.reduce.sequence_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`.
      clip_low, clip_high: how far s counts below and above 1 (paper: epsilon).
    """
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    ratio = exp(row_mean(log_ratio, mask), LARGEST_MEAN)
    return jnp.where(mask != 0, clipped_surrogate(ratio, row_mean(advantages, mask), clip_low, clip_high), 0.0)


def gspo_token(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 3e-4,
    clip_high: Scalar = 4e-4,
) -> Float[Array, "B T"]:
    """GSPO-token, token advantages: -min(s_t A_t, clip(s_t, 1 - clip_low, 1 + clip_high) A_t), s_t = sg(s) pi / sg(pi).

    s is the length-normalised ratio of the row, as in `gspo`; s_t has its value and the gradient of one token. With one
    advantage for all tokens it is `gspo`, in value and gradient. See "Group Sequence Policy Optimization", Zheng et al.
    (https://arxiv.org/abs/2507.18071), eqs. 13 and 14. Published with `alignax.reduce.sequence_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`; each token has its own advantage.
      clip_low, clip_high: how far s counts below and above 1 (paper: epsilon).
    """
    logp, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    sequence = jax.lax.stop_gradient(exp(row_mean(log_ratio, mask), LARGEST_MEAN))
    ratio = sequence * jnp.exp(logp - jax.lax.stop_gradient(logp))
    return clipped_surrogate(ratio, advantages, clip_low, clip_high)


def luspo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 2e-3,
    clip_high: Scalar = 2.5e-3,
) -> Float[Array, "B T"]:
    """LUSPO, unbiased by length: -length min(s A, clip(s, 1 - clip_low, 1 + clip_high) A), s as in GSPO.

    Each token of a long response then moves as far as one of a short response, where GSPO divides by the length. See
    "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
    Liu et al. (https://arxiv.org/abs/2602.05261). Published with `alignax.reduce.sequence_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`.
      clip_low, clip_high: how far s counts below and above 1 (paper: epsilon).
    """
    length = row_sum((mask != 0).astype(jnp.float32))
    return length * gspo(logp, old_logp, advantages, mask, clip_low=clip_low, clip_high=clip_high)


def gmpo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.4,
    clip_high: Scalar = 0.4,
) -> Float[Array, "B T"]:
    """GMPO, geometric mean: -A exp(mean_t d*), d* = min(d, clip_high) for A > 0, else max(d, -clip_low), d = log r.

    PPO's clip on each token, but the geometric mean of the ratios, which no single token can drive away. See
    "Geometric-Mean Policy Optimization", Zhao et al. (https://arxiv.org/abs/2507.20673): ratios between e^-0.4
    and e^0.4, clipped as log-ratios. Published with `alignax.reduce.sequence_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`.
      clip_low, clip_high: how far the log-ratio of a token counts below and above 0 (paper: epsilon = e^0.4).
    """
    check_positive("gmpo", clip_low=clip_low, clip_high=clip_high)
    _, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    advantage = row_mean(advantages, mask)
    bound = jnp.where(advantage > 0, jnp.minimum(log_ratio, clip_high), jnp.maximum(log_ratio, -clip_low))
    return jnp.where(mask != 0, -exp(row_mean(bound, mask)) * advantage, 0.0)


def vespo(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    power_positive: Scalar = 2.0,
    decay_positive: Scalar = 3.0,
    power_negative: Scalar = 3.0,
    decay_negative: Scalar = 2.0,
) -> Float[Array, "B T"]:
    """VESPO, soft sequence weights: -sg(p^k exp(c (1 - p))) A log pi(y_t), k and c by the sign of A, p = prod_t r_t.

    The weight of a whole response, without a cut or a length in it: 1 at p = 1, and small wherever p is far from there.
    See "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
    Shen et al. (https://arxiv.org/abs/2602.10693). Published with `alignax.reduce.token_mean`.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `rloo`.
      power_positive, decay_positive: k and c for A >= 0 (paper: k and lambda).
      power_negative, decay_negative: k and c for A < 0.
    """
    logp, log_ratio, advantages = policy_inputs(logp, old_logp, advantages, mask)
    advantage = row_mean(advantages, mask)
    power = jnp.where(advantage >= 0, power_positive, power_negative)
    decay = jnp.where(advantage >= 0, decay_positive, decay_negative)
    log_weight = jnp.clip(row_sum(log_ratio), -20.0, 20.0)
    weight = jnp.exp(power * log_weight + decay * (1 - jnp.exp(log_weight)))
    return -jax.lax.stop_gradient(weight) * advantage * logp
