"""Generalised preference optimisation: any decreasing function of the margin is a pairwise loss.

The tail at large -z says how hard wrong pairs pull, the tail at large z how soon right ones are let go: with that, the
choice of the function is a choice of regularisation.
"""

from collections.abc import Callable

import jax
from jaxtyping import Float

from alignax.losses import _bounded as bounded
from alignax.losses._checks import check_positive
from alignax.losses._sides import Divergence, log_ratios
from alignax.losses.f_divergence import f_reverse_kl
from alignax.types import Array, Response, Scalar


def gpo_logistic(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, logistic: log(1 + e^-z), with which it is DPO.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return jax.nn.softplus(-z)


def gpo_hinge(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, hinge: max(0, 1 - z), with which it is SLiC.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return jax.nn.relu(1 - z)


def gpo_squared(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, squared: (z - 1)^2, with which it is IPO of tau = beta / 2, times beta^2.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return bounded.square(z - 1)


def gpo_exponential(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, exponential: e^-z, that of AdaBoost; its exponent is clipped to 80.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return bounded.exp(-z)


def gpo_truncated_quadratic(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, truncated quadratic: max(0, 1 - z)^2.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return bounded.square(jax.nn.relu(1 - z))


def gpo_savage(z: Float[Array, " B"]) -> Float[Array, " B"]:
    """GPO, Savage: 1 / (1 + e^z)^2, which is bounded, so that pairs hopelessly wrong pull no more; not convex.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749), table 1.
    """
    return jax.nn.sigmoid(-z) ** 2


def gpo(
    chosen: Response,
    rejected: Response,
    *,
    convex: Callable[[Array], Array] = gpo_logistic,
    beta: Scalar = 0.1,
    divergence: Divergence = f_reverse_kl,
) -> Float[Array, " B"]:
    """GPO, generalised preference optimisation: f(beta D), for any f with f'(0) < 0.

    See "Generalized Preference Optimization: A Unified Approach to Offline Alignment", Tang et al.
    (https://arxiv.org/abs/2402.05749).

    Args:
      chosen, rejected: the two sides.
      convex: f, such as `gpo_logistic`, `gpo_hinge`, `gpo_squared`, `gpo_exponential`, `gpo_truncated_quadratic`,
        `gpo_savage`.
      beta: how strongly the reference holds (paper: beta).
      divergence: what holds the policy to the reference.

    Raises:
      ValueError: for a beta known not to be above 0.
    """
    check_positive("gpo", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected, divergence)
    return convex(beta * (x_chosen - x_rejected))
