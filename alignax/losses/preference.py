"""Pairwise preference losses: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected. A loss reads what it needs from two
`Response`s; the reference is a constant, and reference-free use (`ref_logp=None`) sets its log-probabilities to 0.
`divergence` replaces x by f'(e^x) of another divergence than the reverse KL: see `alignax.losses.f_divergence`.
"""

import jax
from jax.core import Tracer
from jaxtyping import Float

from alignax.losses._sides import Divergence, average_log_ratio, check_sides, log_ratios
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
    https://ericmitchell.ai/cdpo.pdf).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5) (paper: epsilon).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a label_smoothing known to lie outside [0, 0.5).
    """
    if not isinstance(label_smoothing, Tracer) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo: label_smoothing={label_smoothing}; expected 0 <= label_smoothing < 0.5")
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    logit = beta * (x_chosen - x_rejected)
    return jax.nn.softplus(logit) - (1 - label_smoothing) * logit


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
    """
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return (x_chosen - x_rejected - 1 / (2 * beta)) ** 2


def ipo_average(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """IPO over average tokens: (d - 1 / (2 beta))^2, d = x_chosen / length_chosen - x_rejected / length_rejected.

    Lengths no longer set the scale. TRL and HALOs compute it so, as IPO's authors told them. See "A General
    Theoretical Paradigm to Understand Learning from Human Preferences", Azar et al. (https://arxiv.org/abs/2310.12036).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds, per token (paper: tau).
    """
    check_sides(chosen, rejected)
    return (average_log_ratio(chosen) - average_log_ratio(rejected) - 1 / (2 * beta)) ** 2
