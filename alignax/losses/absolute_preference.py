"""Pairwise losses of each side's own log-ratio, not of their difference: `loss(chosen, rejected, *, ...) -> [B]`.

Where a loss of the margin is content when the rejected side falls faster than the chosen one, these say where each side
should go. Notation and `divergence` as in `alignax.losses.preference`: x = log pi(y|x) - log ref(y|x) of one side.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses import _bounded as bounded
from alignax.losses._checks import check, check_positive
from alignax.losses._sides import Divergence, check_reference, log_ratios
from alignax.losses.extras import extra, needs
from alignax.losses.f_divergence import f_reverse_kl
from alignax.types import Array, Response, Scalar


def apo_zero(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """APO-zero: (1 - sigmoid(beta x_chosen)) + sigmoid(beta x_rejected), chosen up and rejected down.

    For data better than the model. See "Anchored Preference Optimization and Contrastive Revisions: Addressing
    Underspecification in Alignment", D'Oosterlinck et al. (https://arxiv.org/abs/2408.06266).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("apo_zero", chosen, rejected, beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    return jax.nn.sigmoid(-beta * x_chosen) + jax.nn.sigmoid(beta * x_rejected)


def apo_down(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """APO-down: sigmoid(beta x_chosen) + (1 - sigmoid(beta D)), chosen down and rejected further down.

    For a model better than the data. See "Anchored Preference Optimization and Contrastive Revisions: Addressing
    Underspecification in Alignment", D'Oosterlinck et al. (https://arxiv.org/abs/2408.06266).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      divergence: what holds the policy to the reference, in D only.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("apo_down", chosen, rejected, beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    margin = divergence(x_chosen) - divergence(x_rejected)
    return jax.nn.sigmoid(beta * x_chosen) + jax.nn.sigmoid(-beta * margin)


def nca_pair(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.01, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """NCA over pairs: -log sigmoid(r_c) - (log sigmoid(-r_c) + log sigmoid(-r_r)) / 2, r = beta x of each side.

    The chosen side comes to rest at r = log 2, so its likelihood does not sink along with the rejected one's. See
    "Noise Contrastive Alignment of Language Models with Explicit Rewards", Chen et al.
    (https://arxiv.org/abs/2402.05369).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("nca_pair", chosen, rejected, beta)
    r_chosen, r_rejected = (beta * x for x in log_ratios(chosen, rejected, divergence))
    noise = jax.nn.softplus(r_chosen) + jax.nn.softplus(r_rejected)
    return jax.nn.softplus(-r_chosen) + noise / 2


def bco_pair(
    chosen: Response,
    rejected: Response,
    *,
    beta: Scalar = 0.1,
    delta: Scalar = 0.0,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """BCO over pairs: -log sigmoid(beta x_chosen - delta) - log sigmoid(-(beta x_rejected - delta)).

    Logistic regression that tells chosen from rejected by their implicit rewards. See "Binary Classifier Optimization
    for Large Language Model Alignment", Jung et al. (https://arxiv.org/abs/2404.04656).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: beta).
      delta: the reward of indifference, a constant to differentiation: the running mean of all rewards in the paper and
        in TRL up to 0.28, 0 in TRL since.
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("bco_pair", chosen, rejected, beta)
    chex.assert_rank(delta, 0)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    delta = jax.lax.stop_gradient(delta)
    return jax.nn.softplus(delta - beta * x_chosen) + jax.nn.softplus(beta * x_rejected - delta)


def kto_pair(
    chosen: Response,
    rejected: Response,
    *,
    kl_chosen: Scalar,
    kl_rejected: Scalar,
    beta: Scalar = 0.1,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """KTO over pairs: (sigmoid(beta (z_rejected - x_chosen)) + sigmoid(beta (x_rejected - z_chosen))) / 2.

    Each side is weighed against the KL of the other, z = max(0, mean x) over the batch. The mean of the two terms: a
    batch of pairs is one of twice as many answers. See "KTO: Model Alignment as Prospect Theoretic Optimization",
    Ethayarajh et al. (https://arxiv.org/abs/2402.01306); its own form, with mismatched answers, is `kto`.

    Args:
      chosen, rejected: the two sides.
      kl_chosen, kl_rejected: mean log-ratio of each side over the whole batch, clamped at 0 here and constants to
        differentiation (paper: z_0).
      beta: how strongly the reference holds (paper: beta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("kto_pair", chosen, rejected, beta)
    chex.assert_rank([kl_chosen, kl_rejected], 0)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    z_chosen, z_rejected = (jax.lax.stop_gradient(jnp.maximum(kl, 0.0)) for kl in (kl_chosen, kl_rejected))
    return (jax.nn.sigmoid(beta * (z_rejected - x_chosen)) + jax.nn.sigmoid(beta * (x_rejected - z_chosen))) / 2


@needs("win_rate")
def sppo(
    chosen: Response, rejected: Response, *, beta: Scalar = 1e-3, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """SPPO: ((x_chosen - (P_chosen - 1/2) / beta)^2 + (x_rejected - (P_rejected - 1/2) / beta)^2) / 2.

    Each log-ratio goes to what a step of multiplicative weights gives it, by how often that answer wins against the
    policy's own. The reference is the policy of the last iteration. See "Self-Play Preference Optimization for Language
    Model Alignment", Wu et al. (https://arxiv.org/abs/2405.00675). With 0.001 the loss is of order 1e5.

    Args:
      chosen, rejected: the two sides, with `win_rate` [B] in [0, 1] in their `extra`: constants to differentiation.
      beta: how strongly the reference holds (paper: 1 / eta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference, a `win_rate` missing or known to lie
        outside [0, 1].
    """
    _check("sppo", chosen, rejected, beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    chosen_loss = bounded.square(x_chosen - _centred_win_rate(chosen) / beta)
    return (chosen_loss + bounded.square(x_rejected - _centred_win_rate(rejected) / beta)) / 2


def sppo_hard(
    chosen: Response, rejected: Response, *, beta: Scalar = 1e-3, divergence: Divergence = f_reverse_kl
) -> Float[Array, " B"]:
    """SPPO with win rates 1 and 0: (x_chosen - 1 / (2 beta))^2 + (x_rejected + 1 / (2 beta))^2.

    As TRL has it, without the factor 1/2 of `sppo`: twice the loss of the authors' code. See "Self-Play Preference
    Optimization for Language Model Alignment", Wu et al. (https://arxiv.org/abs/2405.00675).

    Args:
      chosen, rejected: the two sides.
      beta: how strongly the reference holds (paper: 1 / eta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0, a side without a reference.
    """
    _check("sppo_hard", chosen, rejected, beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return bounded.square(x_chosen - 1 / (2 * beta)) + bounded.square(x_rejected + 1 / (2 * beta))


def _check(loss: str, chosen: Response, rejected: Response, beta: Scalar) -> None:
    check_positive(loss, beta=beta)
    check_reference(loss, chosen, rejected)


def _centred_win_rate(response: Response) -> Array:
    win_rate = extra(response, "win_rate", "sppo")
    chex.assert_shape(win_rate, response.logp.shape[:1])
    check("sppo", "win_rate", win_rate, lambda x: (x >= 0) & (x <= 1), "0 <= win_rate <= 1")
    return jax.lax.stop_gradient(win_rate.astype(jnp.float32) - 0.5)
