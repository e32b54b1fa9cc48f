"""Pairwise losses that add to DPO's margin, or to DPO: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._sides import check_reference, log_ratio, log_ratios
from alignax.losses.extras import extra, needs
from alignax.losses.preference import dpo
from alignax.types import Array, Response, Scalar


def dpop(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.3, penalty_weight: Scalar = 50.0
) -> Float[Array, " B"]:
    """DPOP, DPO-positive (Smaug): -log sigmoid(beta (D - lambda max(0, -x_chosen))).

    DPO may lower the chosen side as long as the rejected one falls further; here that costs lambda times over. See
    "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive", Pal et al.
    (https://arxiv.org/abs/2402.13228), eq. 3.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      penalty_weight: of a chosen side below the reference, 0 for DPO (paper: lambda; 5 to 500 there).

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    check_positive("dpop", beta=beta)
    check_reference("dpop", chosen, rejected)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    penalty = jax.nn.relu(-x_chosen)
    return -jax.nn.log_sigmoid(beta * (x_chosen - x_rejected - penalty_weight * penalty))


def rpo(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    alpha: Scalar = 1.0,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, " B"]:
    """Iterative RPO, DPO with NLL by example: dpo(chosen, rejected) - alpha log pi(y_chosen|x) / n_chosen.

    See "Iterative Reasoning Preference Optimization", Pang et al. (https://arxiv.org/abs/2404.19733). With the
    NLL as a mean over all tokens of the batch (TRL) it is `losses.dpo` and
    `alignax.algorithms.preference.make_loss(..., nll_weight=1.0)`.

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      alpha: weight of the NLL; 0.005 in "Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an
        Adversarial Regularizer", Liu et al. (https://arxiv.org/abs/2405.16436) (paper: alpha).
      label_smoothing: probability that a label is wrong, in [0, 0.5).

    Raises:
      ValueError: for a beta known not to be above 0, a label_smoothing known to lie outside [0, 0.5).
    """
    check_positive("rpo", beta=beta)
    return dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing) - alpha * chosen.mean


@needs("forward_kl")
def tdpo1(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """TDPO, version 1: -log sigmoid(beta (D - (K_rejected - K_chosen))), K = sum_t KL(ref(.|t) || pi(.|t)).

    Bradley-Terry over tokens holds the two sides to the reference evenly; the gradient goes through both K. See
    "Token-level Direct Preference Optimization", Zeng et al. (https://arxiv.org/abs/2404.11999).

    Args:
      chosen, rejected: the two sides; `extra["forward_kl"]` of both is `[B, T]`, at each token.
      beta: how strongly the reference holds (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference or what else it needs.
    """
    check_positive("tdpo1", beta=beta)
    check_reference("tdpo1", chosen, rejected)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    kl_chosen, kl_rejected = _total_kl(chosen, "tdpo1"), _total_kl(rejected, "tdpo1")
    return -jax.nn.log_sigmoid(beta * (x_chosen - x_rejected - (kl_rejected - kl_chosen)))


@needs("forward_kl")
def tdpo2(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, alpha: Scalar = 0.5) -> Float[Array, " B"]:
    """TDPO, version 2: -log sigmoid(beta (D - alpha (K_rejected - sg(K_chosen)))), K = sum_t KL(ref(.|t) || pi(.|t)).

    Version 1 rewards a larger K_chosen; without its gradient, only K_rejected is held. See "Token-level Direct
    Preference Optimization", Zeng et al. (https://arxiv.org/abs/2404.11999).

    Args:
      chosen, rejected: the two sides; `extra["forward_kl"]` of both is `[B, T]`, at each token.
      beta: how strongly the reference holds (paper: beta).
      alpha: weight of the divergences (paper: alpha).

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference or what else it needs.
    """
    check_positive("tdpo2", beta=beta)
    check_reference("tdpo2", chosen, rejected)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    kl_chosen, kl_rejected = jax.lax.stop_gradient(_total_kl(chosen, "tdpo2")), _total_kl(rejected, "tdpo2")
    return -jax.nn.log_sigmoid(beta * (x_chosen - x_rejected - alpha * (kl_rejected - kl_chosen)))


@needs("degraded_logp", "degraded_ref_logp", "degraded_mask")
def mdpo(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    anchor: Scalar = 0.0,
    condition_weight: Scalar = 1.0,
    anchor_weight: Scalar = 1.0,
) -> Float[Array, " B"]:
    """mDPO: -log s(beta D) - w_c log s(beta (x_chosen - x_degraded)) - w_a log s(beta x_chosen - delta), s the sigmoid.

    DPO; conditional DPO, where the same answer should be likelier after its whole condition than after a degraded one
    (an image cropped, a context cut), so that the condition is not ignored; and an anchor that keeps the chosen side
    above the reference. See "mDPO: Conditional Preference Optimization for Multimodal Large Language Models", Wang et
    al. (https://arxiv.org/abs/2406.11839).

    Args:
      chosen, rejected: the two sides; `chosen.extra` has `degraded_logp`, `degraded_ref_logp` and `degraded_mask`,
        `[B, T']`, of the chosen answer after its degraded condition.
      beta: how strongly the reference holds (paper: beta).
      anchor: reward that the chosen side should have (paper: delta).
      condition_weight, anchor_weight: of the second and third summand.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference or what else it needs.
    """
    check_positive("mdpo", beta=beta)
    check_reference("mdpo", chosen, rejected)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    logp, ref_logp, mask = (extra(chosen, f"degraded_{name}", "mdpo") for name in ("logp", "ref_logp", "mask"))
    x_degraded = log_ratio(Response(logp, ref_logp, mask))
    chex.assert_equal_shape([x_chosen, x_degraded])
    condition = jax.nn.log_sigmoid(beta * (x_chosen - x_degraded))
    held = jax.nn.log_sigmoid(beta * x_chosen - anchor)
    preference = jax.nn.log_sigmoid(beta * (x_chosen - x_rejected))
    return -(preference + condition_weight * condition + anchor_weight * held)


def _total_kl(response: Response, loss: str) -> Float[Array, " B"]:
    kl = extra(response, "forward_kl", loss)
    chex.assert_equal_shape([kl, response.mask])
    return jnp.sum(jnp.where(response.mask != 0, kl.astype(jnp.float32), 0.0), axis=-1)
