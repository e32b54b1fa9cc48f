"""Pairwise preference losses: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected. A loss reads what it needs from two
`Response`s; the reference is a constant, and reference-free use (`ref_logp=None`) sets its log-probabilities to 0.
"""

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from alignax.types import Array, Response, Scalar


def dpo(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, label_smoothing: Scalar = 0.0
) -> Float[Array, " B"]:
    """Direct preference optimisation: -(1 - eps) log sigmoid(beta D) - eps log sigmoid(-beta D).

    See "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", Rafailov et al.
    (https://arxiv.org/abs/2305.18290), eq. 7. With eps > 0 it is conservative DPO, for labels that are wrong with
    probability eps ("A note on DPO with noisy preferences & relationship to IPO", Mitchell,
    https://ericmitchell.ai/cdpo.pdf).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      label_smoothing: probability that a label is wrong, in [0, 0.5) (paper: epsilon).

    Raises:
      ValueError: for a label_smoothing known to lie outside [0, 0.5).
    """
    if not isinstance(label_smoothing, Tracer) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"dpo: label_smoothing={label_smoothing}; expected 0 <= label_smoothing < 0.5")
    logit = beta * (_log_ratio(chosen) - _log_ratio(rejected))
    return jax.nn.softplus(logit) - (1 - label_smoothing) * logit


def ipo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """Identity preference optimisation: (D - 1 / (2 beta))^2, with D of whole sequences.

    See "A General Theoretical Paradigm to Understand Learning from Human Preferences", Azar et al.
    (https://arxiv.org/abs/2310.12036), eq. 17.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: tau).
    """
    margin = _log_ratio(chosen) - _log_ratio(rejected)
    return (margin - 1 / (2 * beta)) ** 2


def ipo_average(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """`ipo` with log-ratios averaged over each side's tokens, as TRL computes it: lengths no longer set the scale."""
    margin = _log_ratio(chosen) / jnp.maximum(chosen.length, 1) - _log_ratio(rejected) / jnp.maximum(rejected.length, 1)
    return (margin - 1 / (2 * beta)) ** 2


def _log_ratio(response: Response) -> Float[Array, " B"]:
    chex.assert_rank([response.logp, response.mask], 2)
    chex.assert_equal_shape([response.logp, response.mask])
    return response.sum - response.ref_sum
