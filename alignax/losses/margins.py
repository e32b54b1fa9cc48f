"""Pairwise losses that are told how much better the chosen side is: `loss(chosen, rejected, *, ...) -> [B]`.

Notation: x = log pi(y|x) - log ref(y|x) of one side, D = x_chosen - x_rejected, z = beta D. Reward-aware preference
optimisation (RPO) moves z to g = eta (r_chosen - r_rejected), the gap of given rewards, where DPO moves it to infinity;
s is the sigmoid, and Ber(s(z)) the preference that z means.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.losses._logistic import binary_kl
from alignax.losses._sides import log_ratios
from alignax.losses.extras import extra, needs
from alignax.types import Array, Response, Scalar


@needs("margin")
def odpo(chosen: Response, rejected: Response, *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """ODPO, DPO with an offset: -log sigmoid(beta D - m), m the margin by which the chosen side should win.

    Pairs whose ratings differ more are pushed further apart. See "Direct Preference Optimization with an Offset", Amini
    et al. (https://arxiv.org/abs/2402.10571).

    Args:
      chosen, rejected: the two sides; `chosen.extra["margin"]` is `[B]`, at least 0, in units of the reward beta x
        (paper: Delta_r), for example alpha log(r_chosen - r_rejected) of two ratings.
      beta: how strongly the reference holds (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without what it needs.
    """
    check_positive("odpo", beta=beta)
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    return -jax.nn.log_sigmoid(beta * (x_chosen - x_rejected) - _constant(chosen, "margin", "odpo"))


@needs("reward")
def rpo_backward_kl(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, eta: Scalar = 1.0
) -> Float[Array, " B"]:
    """Reward-aware RPO, backward KL: KL(Ber(s(g)) || Ber(s(z))), z = beta D, g = eta (r_chosen - r_rejected).

    Cross-entropy to the preference that the rewards imply, less its entropy. See "Reward-aware Preference Optimization:
    A Unified Mathematical Framework for Model Alignment", Sun et al. (https://arxiv.org/abs/2502.00203); "Nemotron-4
    340B Technical Report", NVIDIA (https://arxiv.org/abs/2406.11704), trained with it.

    Args:
      chosen, rejected: the two sides; `extra["reward"]` of both is `[B]` (paper: r*).
      beta: how strongly the reference holds (paper: beta).
      eta: scale of the rewards (paper: eta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without what it needs.
    """
    check_positive("rpo_backward_kl", beta=beta)
    z, g = _gaps(chosen, rejected, beta, eta, "rpo_backward_kl")
    return binary_kl(g, jax.nn.log_sigmoid(z), jax.nn.log_sigmoid(-z))


@needs("reward")
def rpo_forward_kl(
    chosen: Response, rejected: Response, *, beta: Scalar = 0.1, eta: Scalar = 1.0
) -> Float[Array, " B"]:
    """Reward-aware RPO, forward KL: KL(Ber(s(z)) || Ber(s(g))), z = beta D, g = eta (r_chosen - r_rejected).

    See "Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment", Sun et al.
    (https://arxiv.org/abs/2502.00203). Its gradient vanishes where z is far from 0, on the wrong side too.

    Args:
      chosen, rejected: the two sides; `extra["reward"]` of both is `[B]` (paper: r*).
      beta: how strongly the reference holds (paper: beta).
      eta: scale of the rewards (paper: eta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without what it needs.
    """
    check_positive("rpo_forward_kl", beta=beta)
    z, g = _gaps(chosen, rejected, beta, eta, "rpo_forward_kl")
    return binary_kl(z, jax.nn.log_sigmoid(g), jax.nn.log_sigmoid(-g))


@needs("reward")
def rpo_squared(chosen: Response, rejected: Response, *, beta: Scalar = 0.1, eta: Scalar = 1.0) -> Float[Array, " B"]:
    """Reward-aware RPO, squared distance: (z - g)^2, z = beta D, g = eta (r_chosen - r_rejected).

    See "Reward-aware Preference Optimization: A Unified Mathematical Framework for Model Alignment", Sun et al.
    (https://arxiv.org/abs/2502.00203). With a gap of 1/2 for every pair it is IPO, times beta^2.

    Args:
      chosen, rejected: the two sides; `extra["reward"]` of both is `[B]` (paper: r*).
      beta: how strongly the reference holds (paper: beta).
      eta: scale of the rewards (paper: eta).

    Raises:
      ValueError: for a beta known not to be above 0, a side without what it needs.
    """
    check_positive("rpo_squared", beta=beta)
    z, g = _gaps(chosen, rejected, beta, eta, "rpo_squared")
    return (z - g) ** 2


def _gaps(chosen: Response, rejected: Response, beta: Scalar, eta: Scalar, loss: str) -> tuple[Array, Array]:
    """z of the policy and g of the given rewards."""
    x_chosen, x_rejected = log_ratios(chosen, rejected)
    gap = _constant(chosen, "reward", loss) - _constant(rejected, "reward", loss)
    return beta * (x_chosen - x_rejected), eta * gap


def _constant(response: Response, name: str, loss: str) -> Float[Array, " B"]:
    """A number given with every pair, which nothing differentiates."""
    x = extra(response, name, loss)
    chex.assert_shape(x, response.logp.shape[:1])
    return jax.lax.stop_gradient(x.astype(jnp.float32))
