"""Logarithms of probabilities that stay exact, value and gradient, where the probability nears 0 or 1."""

import math

import jax
import jax.numpy as jnp

from alignax.losses._checks import check_label_smoothing
from alignax.types import Array, Scalar


def log1mexp(x: Array, largest: float = -1e-6) -> Array:
    """log(1 - e^x) for x < 0; above `largest` the value there and no gradient, where both would be infinite at 0."""
    x = jnp.minimum(x.astype(jnp.float32), largest)  # there both branches are finite, and their derivatives
    return jnp.where(x > -math.log(2), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def binary_cross_entropy(logit: Array, target: Array | Scalar) -> Array:
    """-p log sigmoid(z) - (1 - p) log sigmoid(-z), of a target probability p.

    Not softplus(z) - p z, which has no digits left once z is large.
    """
    return target * jax.nn.softplus(-logit) + (1 - target) * jax.nn.softplus(logit)


def binary_kl(logit: Array, log_target: Array | Scalar, log_rest: Array | Scalar) -> Array:
    """KL(q || p) of q = (sigmoid(z), sigmoid(-z)) and p given as two logarithms; those of any two weights will do."""
    first = jax.nn.sigmoid(logit) * (jax.nn.log_sigmoid(logit) - log_target)
    return first + jax.nn.sigmoid(-logit) * (jax.nn.log_sigmoid(-logit) - log_rest)


def smoothed_logistic(logit: Array, label_smoothing: Scalar, loss: str) -> Array:
    """-(1 - eps) log sigmoid(logit) - eps log sigmoid(-logit).

    Raises:
      ValueError: naming the loss, for a label_smoothing known to lie outside [0, 0.5).
    """
    check_label_smoothing(loss, label_smoothing)
    return binary_cross_entropy(logit, 1 - label_smoothing)
