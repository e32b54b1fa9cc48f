"""Losses of pairs that a policy sampled itself, judged by a preference function; and the policy gradient of that game.

`preference` is the probability p that the first side wins, 1/2 for a tie, a constant. D is the difference of the two
sides' log-ratios, as in `alignax.losses.preference`. Labels need no loss of their own: order the pair by p, and take
`losses.dpo` (online DPO), `losses.ipo` (online IPO) or `losses.sppo`. IPO-MD is `ipo_soft` on two samples of the
geometric mixture of policy and reference (`alignax.models.mixture`).
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax.losses import _bounded as bounded
from alignax.losses._checks import check, check_positive
from alignax.losses._logistic import binary_cross_entropy
from alignax.losses._sides import Divergence, log_ratios
from alignax.losses.extras import extra, needs
from alignax.losses.f_divergence import f_reverse_kl
from alignax.losses.preference import dpo
from alignax.types import LEAST_LOGP, Array, Response, Scalar


@needs("preference")
def dpo_soft(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """Online DPO, soft labels: -p log sigmoid(beta D) - (1 - p) log sigmoid(-beta D), p the first side's preference.

    The expectation of DPO over a label drawn with probability p. See "RLAIF vs. RLHF: Scaling Reinforcement Learning
    from Human Feedback with AI Feedback", Lee et al. (https://arxiv.org/abs/2309.00267), and for pairs of the policy's
    own samples "Direct Language Model Alignment from Online AI Feedback", Guo et al.
    (https://arxiv.org/abs/2402.04792).

    Args:
      chosen, rejected: the first and the second side, in any order; `chosen.extra["preference"]` is p, `[B]`.
      beta: how strongly the reference holds (paper: beta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a preference known to lie outside [0, 1], or a beta known not to be above 0.
    """
    check_positive("dpo_soft", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    logit = beta * (x_chosen - x_rejected)
    return binary_cross_entropy(logit, _preference(chosen, "dpo_soft"))


@needs("preference")
def ipo_soft(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """Online IPO, soft labels: (D - (p - 1/2) / beta)^2, with p the first side's preference and D of whole sequences.

    `ipo` in expectation over a label drawn with probability p, up to a constant. On two samples of the policy its
    gradient is that of self-play in the regularised game, on two samples of the mixture it is IPO-MD. See "Human
    Alignment of Large Language Models through Online Preference Optimisation", Calandriello et al.
    (https://arxiv.org/abs/2403.08635).

    Args:
      chosen, rejected: the first and the second side, in any order; `chosen.extra["preference"]` is p, `[B]`.
      beta: how strongly the reference holds (paper: tau).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a preference known to lie outside [0, 1], or a beta known not to be above 0.
    """
    check_positive("ipo_soft", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return bounded.square(x_chosen - x_rejected - (_preference(chosen, "ipo_soft") - 0.5) / beta)


@needs("from_reference")
def xpo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, alpha: Scalar = 1e-5) -> Float[Array, " B"]:
    """XPO, exploratory preference optimisation: -log sigmoid(beta D) + alpha log pi(y_ref), y_ref the reference's side.

    One side is a sample of the policy, the other one of the reference, and whichever the latter is loses probability:
    optimism towards what the reference would not say. See "Exploratory Preference Optimization: Harnessing Implicit
    Q*-Approximation for Sample-Efficient RLHF", Xie et al. (https://arxiv.org/abs/2405.21046), algorithm 1.

    Args:
      chosen, rejected: the two sides; `extra["from_reference"]` `[B]` is 1 for the one that the reference sampled.
      beta: how strongly the reference holds (paper: beta).
      alpha: how much is explored (paper: alpha); TRL's default.

    Raises:
      ValueError: for a pair both of whose sides are known to be the reference's.
    """
    loss = dpo(chosen, rejected, beta=beta)
    flags = [extra(side, "from_reference", "xpo") for side in (chosen, rejected)]
    chex.assert_shape(flags, loss.shape)
    if not any(isinstance(flag, Tracer) for flag in flags) and np.any(np.asarray(flags, bool).all(axis=0)):
        raise ValueError("xpo: both sides of a pair are from the reference; expected one, the other from the policy")
    log_probs = (jnp.where(flag != 0, side.sum, 0.0) for side, flag in zip((chosen, rejected), flags))
    return loss + alpha * sum(log_probs)


def nash_md(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    preference: Float[Array, " B"],
    mask: Array,
    *,
    kl_weight: Scalar = 0.1,
) -> Float[Array, "B T"]:
    """Nash-MD policy gradient: -(p - 1/2 - kl_weight sum_{s>=t} d_s) log pi(y_t), d = log pi - log ref at a token.

    A policy gradient whose reward is the preference over an opponent less a KL to the reference: with an opponent that
    is the geometric mixture of policy and reference it is Nash-MD, with an average of past parameters Nash-EMA. The
    1/2 is a baseline. A token answers only for the log-ratios from its own on, which leaves the expectation as it is
    (`nash_md_sequence`) and takes away variance. The published reduction is `reduce.sequence_sum`. See "Nash Learning
    from Human Feedback", Munos et al. (https://arxiv.org/abs/2312.00886), section 7.

    Args:
      logp: `[B, T]` under the policy that is trained, which sampled these rows.
      ref_logp: `[B, T]` under the reference, a constant.
      preference: `[B]`, the probability that a row wins against its opponent's, a constant.
      mask: `[B, T]`, the tokens the policy chose.
      kl_weight: how strongly the reference holds (paper: tau).

    Raises:
      ValueError: for a preference known to lie outside [0, 1].
    """
    logp, log_ratio = _log_ratio(logp, ref_logp, mask)
    advantage = _probability(preference, logp, "nash_md")[:, None] - 0.5
    return -(advantage - kl_weight * jax.lax.cumsum(log_ratio, axis=1, reverse=True)) * logp


def nash_md_sequence(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    preference: Float[Array, " B"],
    mask: Array,
    *,
    kl_weight: Scalar = 0.1,
) -> Float[Array, "B T"]:
    """Nash-MD policy gradient, whole sequences: -(p - 1/2 - kl_weight sum_s d_s) log pi(y_t), d = log pi - log ref.

    The estimator as it is published: every token answers for the log-ratio of the whole row. Reduced with
    `reduce.sequence_sum`. See "Nash Learning from Human Feedback", Munos et al. (https://arxiv.org/abs/2312.00886),
    section 7.

    Args:
      logp, ref_logp, preference, mask, kl_weight: as for `nash_md`.

    Raises:
      ValueError: for a preference known to lie outside [0, 1].
    """
    logp, log_ratio = _log_ratio(logp, ref_logp, mask)
    advantage = _probability(preference, logp, "nash_md_sequence")[:, None] - 0.5
    return -(advantage - kl_weight * jnp.sum(log_ratio, axis=1, keepdims=True)) * logp


def nash_md_trl(
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    preference: Float[Array, " B"],
    mask: Array,
    *,
    kl_weight: Scalar = 0.1,
) -> Float[Array, "B T"]:
    """Nash-MD policy gradient, TRL's: -(p - 1/2 - kl_weight d_t) log pi(y_t), d = log pi - log ref at a token.

    A token answers for its own log-ratio alone, not for those behind it that it leads to: biased, but what TRL trains
    with. Reduced with `reduce.sequence_sum`. After "Nash Learning from Human Feedback", Munos et al.
    (https://arxiv.org/abs/2312.00886), section 7.

    Args:
      logp, ref_logp, preference, mask, kl_weight: as for `nash_md`.

    Raises:
      ValueError: for a preference known to lie outside [0, 1].
    """
    logp, log_ratio = _log_ratio(logp, ref_logp, mask)
    advantage = _probability(preference, logp, "nash_md_trl")[:, None] - 0.5
    return -(advantage - kl_weight * log_ratio) * logp


def _preference(response: Response, loss: str) -> Float[Array, " B"]:
    return _probability(extra(response, "preference", loss), response.logp, loss, "extra['preference']")


def _probability(preference: Array, logp: Array, loss: str, name: str = "preference") -> Float[Array, " B"]:
    """As a constant in float32."""
    chex.assert_shape(preference, logp.shape[:1])
    check(loss, name, preference, lambda p: (p >= 0) & (p <= 1), "probabilities, from 0 to 1")
    return jax.lax.stop_gradient(jnp.asarray(preference, jnp.float32))


def _log_ratio(logp: Array, ref_logp: Array, mask: Array) -> tuple[Array, Array]:
    """log pi and log pi - log ref, 0 off the mask, the latter a constant."""
    chex.assert_rank([logp, ref_logp, mask], 2)
    chex.assert_equal_shape([logp, ref_logp, mask])
    logp, ref_logp = (jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (logp, ref_logp))
    # the floor of `Response.sum`: a token of probability 0 times a weight of 0 would be NaN
    logp, ref_logp = jnp.maximum(logp, LEAST_LOGP), jnp.maximum(ref_logp, LEAST_LOGP)
    return logp, jax.lax.stop_gradient(logp - ref_logp)
