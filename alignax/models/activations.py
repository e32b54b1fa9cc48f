"""The two GELUs, as functions with a name, so that configurations that use them compare equal. SiLU is in `jax.nn`."""

import jax
from jaxtyping import Float

from alignax.types import Array


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), with Phi the normal distribution function.

    See "Gaussian Error Linear Units (GELUs)", Hendrycks and Gimpel (https://arxiv.org/abs/1606.08415).
    """
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), its approximation in the same paper."""
    return jax.nn.gelu(x, approximate=True)
