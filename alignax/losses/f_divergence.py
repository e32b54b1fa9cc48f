"""Divergences that hold a policy to its reference, as an orthogonal choice: `divergence(x) -> [B]` in pairwise losses.

Maximising reward less beta D_f(policy, reference) gives the implicit reward beta f'(u), u = policy / reference = e^x. A
pairwise loss that takes `divergence` puts f'(e^x) (up to a constant, which cancels between two sides) where the
log-ratio x stands; the reverse KL of RLHF is f'(e^x) = x, and changes nothing. See "Beyond Reverse KL: Generalizing
Direct Preference Optimization with Diverse Divergence Constraints", Wang et al. (https://arxiv.org/abs/2309.16240),
table 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar

MAX_EXPONENT = 80.0  # e^80 is finite in float32, also times beta; beyond it the gradient is 0


def f_reverse_kl(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Reverse KL: x, which leaves a pairwise loss as it is published.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240).
    """
    return x


def f_forward_kl(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Forward KL: -e^-x.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240). The exponent is clipped to 80.
    """
    return -jnp.exp(jnp.minimum(-x, MAX_EXPONENT))


def f_jensen_shannon(x: Float[Array, " B"]) -> Float[Array, " B"]:
    """Jensen-Shannon divergence: log sigmoid(x), which saturates where the policy is far above the reference.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240).
    """
    return jax.nn.log_sigmoid(x)


def f_alpha(x: Float[Array, " B"], *, alpha: Scalar = 0.5) -> Float[Array, " B"]:
    """Alpha-divergence: (1 - e^(-alpha x)) / alpha; alpha 1 is the forward KL, alpha -> 0 the reverse.

    See "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints", Wang et
    al. (https://arxiv.org/abs/2309.16240). The constant 1 / alpha, which cancels between two sides, keeps the digits of
    a small alpha; at 0 the limit is taken. The exponent is clipped to 80.

    Args:
      x: `[B]`, log-ratios.
      alpha: in [0, 1] (paper: alpha). TRL's `f_alpha_divergence_coef` is 1 - alpha since its version 0.29.
    """
    return alpha_reward(x, alpha)


def alpha_reward(x: Array, alpha: Scalar) -> Array:
    """(1 - e^(-alpha x)) / alpha, and x at alpha 0: also the reward of AlphaPO, of average log-probabilities."""
    small = jnp.abs(alpha) < 1e-6  # the first two terms of the series differ from x by less than its rounding
    safe = jnp.where(small, 1.0, alpha)
    return jnp.where(small, x, -jnp.expm1(jnp.minimum(-safe * x, MAX_EXPONENT)) / safe)
