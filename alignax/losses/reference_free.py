"""Pairwise losses without a reference: `loss(chosen, rejected, *, ...) -> [B]`; a `ref_logp` given is not looked at.

Notation: p = log pi(y|x) of one side, a = p / n its average over tokens. CPO, CPO-SimPO and ORPO are published with the
negative log-likelihood of the chosen side as a second summand: the algorithm's `nll_weight`, as that is a mean of its
own. `alignax.algorithms.preference.make_loss(model, loss=losses.cpo, nll_weight=1.0)`.
"""

import jax
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._logistic import log1mexp, smoothed_logistic
from alignax.losses._sides import check_sides
from alignax.losses.extras import without_reference
from alignax.losses.f_divergence import alpha_reward
from alignax.types import Array, Response, Scalar


@without_reference
def cpo(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0
) -> Float[Array, " B"]:
    """CPO, contrastive preferences: -(1 - eps) log sigmoid(z) - eps log sigmoid(-z), z = beta (p_chosen - p_rejected).

    Published with the NLL of the chosen side: `nll_weight` 1. See "Contrastive Preference Optimization: Pushing the
    Boundaries of LLM Performance in Machine Translation", Xu et al. (https://arxiv.org/abs/2401.08417).

    Args:
      chosen, rejected: the two sides.
      beta: scale of the margin (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    check_positive("cpo", beta=beta)
    check_sides(chosen, rejected)
    return smoothed_logistic(beta * (chosen.sum - rejected.sum), label_smoothing, "cpo")


@without_reference
def slic_hf(
    chosen: Response, rejected: Response, *, delta: Scalar = 1.0, target_weight: Scalar = 0.1
) -> Float[Array, " B"]:
    """SLiC-HF, sequence likelihood calibration: max(0, delta - p_chosen + p_rejected) - lambda p_target.

    See "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", Zhao et al. (https://arxiv.org/abs/2305.10425).
    The target is the chosen side, as in HALOs, or another answer, as in the paper (what was fine-tuned on):
    score it with the policy and put its log-probability into `chosen.extra["target_logp"]`.

    Args:
      chosen, rejected: the two sides; `chosen.extra["target_logp"]`, if there, is `[B]`, of whole sequences.
      delta: the margin, in nats (paper: delta).
      target_weight: of the target's log-likelihood, 0 for none (paper: lambda).
    """
    check_sides(chosen, rejected)
    target = chosen.sum
    if "target_logp" in chosen.extra:
        # a response of one token: floored and cast as all others are
        one = chosen.extra["target_logp"][:, None]
        answer = Response(one, None, one == one)
        check_sides(chosen, answer)
        target = answer.sum
    return jax.nn.relu(delta - chosen.sum + rejected.sum) - target_weight * target


@without_reference
def simpo(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar | None = None,
    gamma_beta_ratio: Scalar | None = None,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, " B"]:
    """SimPO: -(1 - eps) log sigmoid(z) - eps log sigmoid(-z), z = beta (a_chosen - a_rejected) - gamma.

    Average log-probabilities as rewards, which is how a decoder ranks, and a target margin. With `nll_weight` it is
    CPO-SimPO (beta 10, gamma 5.4, nll_weight 0.05). See "SimPO: Simple Preference Optimization with a Reference-Free
    Reward", Meng et al. (https://arxiv.org/abs/2405.14734), eq. 6.

    Args:
      chosen, rejected: the two sides.
      beta: scale of the reward; 2 to 2.5, 10 for strong models (paper: beta).
      gamma: the target margin, as the paper and TRL have it (paper: gamma).
      gamma_beta_ratio: gamma / beta, as the authors' code has it, in place of gamma; 0.25, its default, without either.
      label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
      ValueError: for a beta known not to be above 0, both gamma and gamma_beta_ratio, a label_smoothing known
        to lie outside [0, 0.5).
    """
    check_positive("simpo", beta=beta)
    logit = beta * _average_gap(chosen, rejected) - _target_margin("simpo", beta, gamma, gamma_beta_ratio)
    return smoothed_logistic(logit, label_smoothing, "simpo")


@without_reference
def simpo_hinge(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 2.0,
    gamma: Scalar | None = None,
    gamma_beta_ratio: Scalar | None = None,
) -> Float[Array, " B"]:
    """SimPO, hinge: max(0, 1 - z), z = beta (a_chosen - a_rejected) - gamma.

    The other loss of the authors' code. See "SimPO: Simple Preference Optimization with a Reference-Free Reward", Meng
    et al. (https://arxiv.org/abs/2405.14734).

    Args:
      chosen, rejected: the two sides.
      beta: scale of the reward (paper: beta).
      gamma, gamma_beta_ratio: the target margin, as for `simpo`.

    Raises:
      ValueError: for a beta known not to be above 0, both gamma and gamma_beta_ratio.
    """
    check_positive("simpo_hinge", beta=beta)
    margin = _target_margin("simpo_hinge", beta, gamma, gamma_beta_ratio)
    return jax.nn.relu(1 - beta * _average_gap(chosen, rejected) + margin)


@without_reference
def alphapo(
    chosen: Response, rejected: Response, *, beta: Scalar = 2.5, gamma: Scalar = 0.1, alpha: Scalar = 0.25
) -> Float[Array, " B"]:
    """AlphaPO: -log sigmoid(beta (R(a_chosen) - R(a_rejected)) - gamma), R(a) = (1 - e^(-alpha a)) / alpha.

    SimPO with the reward's shape as a choice: dR/da = e^(-alpha a), so alpha > 0 moves unlikely answers more. See
    "AlphaPO: Reward Shape Matters for LLM Alignment", Gupta et al. (https://arxiv.org/abs/2501.03884).

    Args:
      chosen, rejected: the two sides.
      beta: scale of the reward (paper: beta).
      gamma: the target margin (paper: gamma).
      alpha: shape of the reward, of either sign, 0 for SimPO (paper: alpha). The exponent is clipped to 80.

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("alphapo", beta=beta)
    check_sides(chosen, rejected)
    gap = alpha_reward(chosen.mean, alpha) - alpha_reward(rejected.mean, alpha)
    return -jax.nn.log_sigmoid(beta * gap - gamma)


@without_reference
def orpo(chosen: Response, rejected: Response, *, odds_weight: Scalar = 0.1) -> Float[Array, " B"]:
    """ORPO, odds ratio: -lambda log sigmoid(log odds(chosen) - log odds(rejected)), odds = e^a / (1 - e^a).

    The odds term alone. The published loss adds the NLL of the chosen side with weight 1, and needs no fine-tuning
    before: `alignax.algorithms.preference.make_loss(model, loss=losses.orpo, nll_weight=1.0)`. See "ORPO: Monolithic
    Preference Optimization without Reference Model", Hong et al. (https://arxiv.org/abs/2403.07691), eq. 6 and 7.

    Args:
      chosen, rejected: the two sides. Averages above -1e-6, where the odds run to infinity, count as -1e-6 there.
      odds_weight: weight beside the NLL (paper: lambda; TRL: beta).
    """
    check_sides(chosen, rejected)
    return -odds_weight * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(response: Response) -> Float[Array, " B"]:
    """log(e^a / (1 - e^a)), a the average log-probability of a token."""
    return response.mean - log1mexp(response.mean)


def _average_gap(chosen: Response, rejected: Response) -> Float[Array, " B"]:
    check_sides(chosen, rejected)
    return chosen.mean - rejected.mean


def _target_margin(loss: str, beta: Scalar, gamma: Scalar | None, ratio: Scalar | None) -> Scalar:
    if gamma is not None and ratio is not None:
        raise ValueError(f"{loss}: gamma={gamma}, gamma_beta_ratio={ratio}; expected at most one of the two")
    return beta * (0.25 if ratio is None else ratio) if gamma is None else gamma
