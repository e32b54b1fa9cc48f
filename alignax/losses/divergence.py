"""Per-token estimators of KL(pi || ref) from samples of pi; d = logp - ref_logp.

See "Approximating KL Divergence", Schulman (http://joschu.net/blog/kl-approx.html). As a *reward*, use k1: its
expectation is the KL and the others' is not. As a *loss*, use k2, whose expected gradient is that of KL(pi || ref);
the gradient of k3 (GRPO as published) is that of KL(ref || pi), and k1's is zero in expectation.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array


def k1(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """d. Unbiased, of high variance, may be negative."""
    return _difference(logp, ref_logp, mask)


def k2(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """d^2 / 2. Biased, never negative; its gradient is unbiased."""
    return _difference(logp, ref_logp, mask) ** 2 / 2


def k3(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """exp(-d) - 1 + d. Unbiased and never negative. d is clipped to [-20, 20] so that no token can overflow."""
    d = jnp.clip(_difference(logp, ref_logp, mask), -20.0, 20.0)
    return jnp.expm1(-d) + d


def _difference(logp: Array, ref_logp: Array, mask: Array) -> Array:
    chex.assert_rank([logp, ref_logp, mask], 2)
    chex.assert_equal_shape([logp, ref_logp, mask])
    logp, ref_logp = (jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (logp, ref_logp))
    return logp - jax.lax.stop_gradient(ref_logp)
