"""The two GELUs against their formulas."""

import math

import jax.numpy as jnp
import numpy as np

from alignax.models import gelu, gelu_tanh

X = np.linspace(-6, 6, 49)


def test_gelu_is_x_times_the_normal_distribution_function():
    expected = [x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in X]
    np.testing.assert_allclose(gelu(jnp.asarray(X, jnp.float32)), expected, atol=1e-6)


def test_gelu_tanh():
    expected = 0.5 * X * (1 + np.tanh(np.sqrt(2 / np.pi) * (X + 0.044715 * X**3)))
    np.testing.assert_allclose(gelu_tanh(jnp.asarray(X, jnp.float32)), expected, atol=1e-6)
    assert np.max(np.abs(expected - np.asarray(gelu(jnp.asarray(X, jnp.float32))))) > 1e-4  # they are two functions
