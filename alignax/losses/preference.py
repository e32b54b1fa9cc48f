"""Pairwise preference losses of the margin D alone: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected. A loss reads what it needs from two
`Response`s; the reference is a constant, and reference-free use (`ref_logp=None`) sets its log-probabilities to 0.
Losses that read x of one side by itself (`alignax.losses.absolute_preference`) refuse that.
`divergence` replaces x by f'(e^x) of another divergence than the reverse KL: see `alignax.losses.f_divergence`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses import _bounded as bounded
from alignax.losses._checks import check, check_label_smoothing, check_positive
from alignax.losses._logistic import binary_kl, smoothed_logistic
from alignax.losses._sides import Divergence, log_ratios
from alignax.losses.f_divergence import f_reverse_kl
from alignax.types import Array, Response, Scalar


def dpo(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.0,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """DPO, direct preference optimisation: -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D).

    See "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", Rafailov et al.
    (https://arxiv.org/abs/2305.18290), eq. 7. With eps > 0 it is conservative DPO, for labels that are wrong with
    probability eps ("A note on DPO with noisy preferences & relationship to IPO", Mitchell,
    https://ericmitchell.ai/cdpo.pdf). TRL's "sigmoid" ignores its label_smoothing since version 0.29.

    The reference may be any policy, and some methods are no more than another choice of it. SPIN
    (https://arxiv.org/abs/2401.01335): the previous iterate, which also wrote the rejected side, against human text.
    BPO (https://arxiv.org/abs/2406.12168): the behaviour policy, which wrote both. Iterated and online DPO
    (https://arxiv.org/abs/2402.04792): the first policy or that of the last iteration, the pairs drawn anew.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5) (paper: epsilon).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    return smoothed_logistic(_logit("dpo", chosen, rejected, beta, divergence), label_smoothing, "dpo")


def robust_dpo(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 0.1,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """Robust DPO: (-(1 - eps) log sigmoid(beta D) + eps log sigmoid(-beta D)) / (1 - 2 eps).

    Its mean over labels flipped with probability eps is DPO's loss of the true ones: noise adds variance and no bias.
    It may be negative, and has no lower bound. See "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
    Chowdhury et al. (https://arxiv.org/abs/2403.00409).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5) (paper: epsilon).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    check_label_smoothing("robust_dpo", label_smoothing)
    logit = _logit("robust_dpo", chosen, rejected, beta, divergence)
    right, wrong = jax.nn.softplus(-logit), jax.nn.softplus(logit)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.05, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """Hinge: max(0, 1 - beta D), which lets go of a pair once its margin is 1 / beta nats.

    See "Statistical Rejection Sampling Improves Preference Optimization", Liu et al.
    (https://arxiv.org/abs/2309.06657), where it is hinge-norm. Without a reference it is the un-normalised hinge of
    "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", Zhao et al. (https://arxiv.org/abs/2305.10425).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: gamma).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    return jax.nn.relu(1 - _logit("hinge", chosen, rejected, beta, divergence))


def ipo(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """IPO, identity preference optimisation: (D - 1 / (2 beta))^2, with D of whole sequences.

    See "A General Theoretical Paradigm to Understand Learning from Human Preferences", Azar et al.
    (https://arxiv.org/abs/2310.12036), eq. 17.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: tau).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("ipo", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return bounded.square(x_chosen - x_rejected - 1 / (2 * beta))


def ipo_average(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """IPO over average tokens: (d - 1 / (2 beta))^2, d = x_chosen / length_chosen - x_rejected / length_rejected.

    Lengths no longer set the scale. TRL and HALOs compute it so, as IPO's authors told them. See "A General
    Theoretical Paradigm to Understand Learning from Human Preferences", Azar et al. (https://arxiv.org/abs/2310.12036).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds, per token (paper: tau).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("ipo_average", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    d = x_chosen / jnp.maximum(chosen.length, 1.0) - x_rejected / jnp.maximum(rejected.length, 1.0)
    return bounded.square(d - 1 / (2 * beta))


def exo_pair(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    label_smoothing: Scalar = 1e-3,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """EXO over pairs: KL(q || p), q = (sigmoid(beta D), sigmoid(-beta D)), p = (1 - eps, eps).

    The KL is that from the policy, the way round that seeks modes, where DPO's is that from the labels. It is 0 at
    beta D = logit(1 - eps), which is why eps may not be 0. See "Towards Efficient Exact Optimization of Language Model
    Alignment", Ji et al. (https://arxiv.org/abs/2402.00856).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta_pi).
      label_smoothing: probability that a label is wrong, in (0, 0.5) (paper: epsilon).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside (0, 0.5).
    """
    within = "0 < label_smoothing < 0.5 (at 0 the KL is infinite)"
    check("exo_pair", "label_smoothing", label_smoothing, lambda x: (0 < x) & (x < 0.5), within)
    logit = _logit("exo_pair", chosen, rejected, beta, divergence)
    return binary_kl(logit, jnp.log1p(-label_smoothing), jnp.log(label_smoothing))


def exo_official(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    log_epsilon: Scalar = -10.0,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """EXO as its authors' code has it: sum_k q_k (log q_k - t_k), q as in `exo_pair`, t = (0, log eps).

    The targets are not normalised: it is `exo_pair` of eps / (1 + eps) less log(1 + eps), 5e-5 at the default. See
    "Towards Efficient Exact Optimization of Language Model Alignment", Ji et al.
    (https://arxiv.org/abs/2402.00856).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta_pi).
      log_epsilon: log-probability of the rejected side in the target, below 0.
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a log_epsilon known not to be below 0.
    """
    check("exo_official", "log_epsilon", log_epsilon, lambda x: x < 0, "log_epsilon < 0")
    return binary_kl(_logit("exo_official", chosen, rejected, beta, divergence), 0.0, log_epsilon)


def discopop(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.05,
    tau: Scalar = 0.05,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """DiscoPOP: (1 - m) log(1 + e^-z) + m e^-z, z = beta D, m = sigmoid(z / tau).

    Written by a language model and chosen by its results: logistic where the pair is wrong, exponential where it is
    right. Not convex: it has a shallow basin at small negative z. See "Discovering Preference Optimization Algorithms
    with and for Large Language Models", Lu et al. (https://arxiv.org/abs/2406.08414), where it is LRML.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      tau: width of the passage from one form to the other (paper: tau).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta or tau known not to be above 0.
    """
    check_positive("discopop", tau=tau)
    z = _logit("discopop", chosen, rejected, beta, divergence)
    exponential = bounded.exp(jax.nn.log_sigmoid(z / tau) - z)  # m e^-z, whose factors are 0 and inf at large -z
    return jax.nn.sigmoid(-z / tau) * jax.nn.softplus(-z) + exponential


def _logit(loss: str, chosen: Response, rejected: Response, beta: Scalar, divergence: Divergence) -> Array:
    """z = beta D."""
    check_positive(loss, beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return beta * (x_chosen - x_rejected)
