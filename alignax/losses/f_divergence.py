"""Divergences that hold a policy to its reference, as an orthogonal choice: `divergence(x) -> [B]` in pairwise losses.

Maximising reward less beta D_f(policy, reference) gives the implicit reward beta f'(u), u = policy / reference = e^x. A
pairwise loss that takes `divergence` puts f'(e^x) where the log-ratio x stands; the reverse KL of RLHF is f'(e^x) = x,
and changes nothing. f' is known up to a constant, which cancels between two sides; losses that look at one side at a
time need it, and here it is chosen so that f'(1) = 0: whatever the divergence, the reward is 0 where policy and
reference agree. (TRL drops the constants: -e^-x, log sigmoid(x), -e^(-alpha x) / alpha.) See "Beyond Reverse KL:
Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et al.
(https://arxiv.org/abs/2309.16240), table 1.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._bounded import MAX_EXPONENT
from alignax.losses._checks import check
from alignax.types import Array, Scalar


def f_reverse_kl(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Reverse KL: x, which leaves a pairwise loss as it is published.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240), table 1.

    Args:
      x: `[B]`, log-ratios.
    """
    return x


def f_forward_kl(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Forward KL: 1 - e^-x, which grows without bound where the policy loses what the reference holds.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240), table 1. The exponent is clipped to 80.

    Args:
      x: `[B]`, log-ratios.
    """
    return alpha_reward(x, 1.0)


def f_jensen_shannon(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Jensen-Shannon divergence: log sigmoid(x) + log 2, which saturates where the policy is far above the reference.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240), table 1.

    Args:
      x: `[B]`, log-ratios.
    """
    return jax.nn.log_sigmoid(x) + math.log(2)


def f_alpha(x: Float[Array, " B"], *, alpha: Scalar = 0.5) -> Float[Array, " B"]:
    """Alpha-divergence: (1 - e^(-alpha x)) / alpha; alpha 1 is the forward KL, alpha -> 0 the reverse.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240), table 1. At alpha 0 the limit is taken. The exponent is clipped to 80.

    Args:
      x: `[B]`, log-ratios.
      alpha: in [0, 1] (paper: alpha). TRL's `f_alpha_divergence_coef` is 1 - alpha since its version 0.29.

    Raises:
      ValueError: for an alpha known to lie outside [0, 1].
    """
    check("f_alpha", "alpha", alpha, lambda x: (0 <= x) & (x <= 1), "0 <= alpha <= 1")
    return alpha_reward(x, alpha)


def alpha_reward(x: Array, alpha: Scalar) -> Array:
    """(1 - e^(-alpha x)) / alpha, and x at alpha 0: also the reward of AlphaPO, of average log-probabilities."""
    small = jnp.abs(alpha) < 1e-12  # what alpha changes there is less than the rounding of any x below 1e5
    safe = jnp.where(small, 1.0, alpha)
    return jnp.where(small, x, -jnp.expm1(jnp.minimum(-safe * x, MAX_EXPONENT)) / safe)
