"""What policy losses share: inputs made safe, ratios that cannot overflow, the clipped surrogate."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import LEAST_LOGP, Array, Scalar


def policy_inputs(logp: Array, old_logp: Array, advantages: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Log-probabilities, log-ratios, advantages: float32, 0 where masked out; constant but for `logp`."""
    chex.assert_rank([logp, old_logp, advantages, mask], 2)
    chex.assert_equal_shape([logp, old_logp, advantages, mask])
    logp, old_logp, advantages = (
        jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (logp, old_logp, advantages)
    )
    logp, old_logp = jnp.maximum(logp, LEAST_LOGP), jnp.maximum(old_logp, LEAST_LOGP)
    return logp, logp - jax.lax.stop_gradient(old_logp), jax.lax.stop_gradient(advantages)


def exp(log_ratio: Array, largest: float = 20.0) -> Array:
    """The ratio of a log-ratio, which is clipped to [-20, largest]."""
    return jnp.exp(jnp.clip(log_ratio, -20.0, largest))


def row_sum(x: Array) -> Float[Array, "B 1"]:
    """The sum of each row of what is 0 where masked out."""
    return jnp.sum(x, axis=1, keepdims=True)


def row_mean(x: Array, mask: Array) -> Float[Array, "B 1"]:
    """The mean of each row over its masked-in tokens, 0 for an empty row; x is 0 where masked out."""
    return row_sum(x) / jnp.maximum(row_sum((mask != 0).astype(jnp.float32)), 1.0)


def clipped_surrogate(ratio: Array, advantages: Array, clip_low: Scalar, clip_high: Scalar) -> Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)."""
    return -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
