"""Exponentials and squares that stay finite in float32, value and gradient, whatever a divergence makes of a ratio."""

import jax.numpy as jnp

from alignax.types import Array

MAX_EXPONENT = 80.0  # e^80 is finite in float32, also times beta; beyond it the gradient is 0
MAX_SQUARED = 1e18  # as is its square


def exp(x: Array) -> Array:
    """e^x, its exponent clipped to 80."""
    return jnp.exp(jnp.minimum(x, MAX_EXPONENT))


def square(x: Array) -> Array:
    """x^2, |x| clipped to 1e18: the score of a forward KL is as large as e^80, which float32 cannot square."""
    return jnp.clip(x, -MAX_SQUARED, MAX_SQUARED) ** 2
