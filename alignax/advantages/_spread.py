"""Mean and standard deviation within rows of rewards, some of which may be missing (NaN)."""

import chex
import jax.numpy as jnp
from jaxtyping import Bool, Float

from alignax.types import Array, Scalar


def check_groups(rewards: Array, name: str) -> None:
    """Refuses what is not [B, G] with G >= 2; `name` is the caller's, for the error."""
    chex.assert_rank(rewards, 2)
    if rewards.shape[1] < 2:
        raise ValueError(
            f"{name}: rewards of shape {rewards.shape}; expected [B, G] with at least 2 samples of each prompt (G)"
        )


def centre(x: Float[Array, "B N"]) -> tuple[Float[Array, "B N"], Bool[Array, "B N"]]:
    """x - mean of the row's entries (0 where missing), and which entries there are."""
    x = x.astype(jnp.float32)
    there = ~jnp.isnan(x)
    # From the least entry up: large ones that differ little keep their digits, and equal ones differ by exactly 0,
    # where a rounded mean would leave an ulp that a division by std + eps turns into an advantage.
    least = jnp.min(jnp.where(there, x, jnp.inf), axis=1, keepdims=True)
    x = jnp.where(there, x - least, 0.0)
    mean = jnp.sum(x, axis=1, keepdims=True) / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)
    return jnp.where(there, x - mean, 0.0), there


def deviation(centred: Float[Array, "B N"], there: Bool[Array, "B N"], ddof: Scalar) -> Float[Array, "B 1"]:
    """The standard deviation of each row's entries, 0 where there are too few for one."""
    left = jnp.sum(there, axis=1, keepdims=True, dtype=jnp.float32) - ddof
    total = jnp.sum(centred**2, axis=1, keepdims=True)
    return jnp.sqrt(jnp.where(left > 0, total / jnp.where(left > 0, left, 1.0), 0.0))


def divide(centred: Array, spread: Array, eps: Scalar) -> Array:
    """centred / (spread + eps), and 0 where both are 0."""
    scale = jnp.broadcast_to(spread + eps, centred.shape)
    return jnp.where(scale > 0, centred / jnp.where(scale > 0, scale, 1.0), 0.0)
