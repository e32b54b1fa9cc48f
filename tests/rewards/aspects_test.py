"""Several aspects as one score: who overrides whom, and that units do not matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import rewards

SCORES = np.array([[1.0, 200.0, 3.0], [2.0, -100.0, 3.0], [6.0, 50.0, 3.0]], np.float32)


def test_safety_comes_first():
    safety, helpfulness = jnp.array([0.1, 0.6, 0.5, 0.4]), jnp.array([0.9, 0.2, 0.7, 0.3])
    np.testing.assert_array_equal(
        rewards.lexicographic(safety, helpfulness, threshold=0.5), jnp.array([0.1, 0.2, 0.7, 0.4])
    )


def test_gates_are_a_softmax():
    scores, gates = jnp.array([[1.0, 3.0], [5.0, -1.0]]), jnp.array([[0.0, 0.0], [1e4, -1e4]])
    np.testing.assert_allclose(rewards.gated(scores, gates), [2.0, 5.0], rtol=1e-6)


def test_units_do_not_matter_and_agreement_says_nothing():
    x = jnp.asarray(SCORES)
    white = (SCORES[:, :2] - SCORES[:, :2].mean(0)) / SCORES[:, :2].std(0, ddof=1)
    np.testing.assert_allclose(rewards.whitened_sum(x), white.sum(1), atol=1e-5)
    weights = jnp.array([2.0, 0.5, 1.0])
    expected = 2 * white[:, 0] + 0.5 * white[:, 1]
    np.testing.assert_allclose(rewards.whitened_sum(x, weights), expected, atol=1e-5)
    np.testing.assert_allclose(rewards.whitened_sum(x * jnp.array([[1, 1e3, 1]]) + 7, weights), expected, atol=1e-4)


def test_scores_are_constants_and_shapes_are_checked():
    x = jnp.asarray(SCORES)
    slope = jax.grad(lambda x: jnp.sum(rewards.whitened_sum(x)[:2] + rewards.gated(x, x)[:2]))(x)
    np.testing.assert_array_equal(slope, np.zeros(SCORES.shape))
    for bad in (
        lambda: rewards.whitened_sum(x, x[0, :2]),
        lambda: rewards.gated(x, x[:, 1:]),
        lambda: rewards.gated(x, x[0]),
    ):
        with pytest.raises(Exception, match=r"rank|shape|type"):
            bad()
    with pytest.raises(Exception, match=r"rank|shape|type"):
        rewards.lexicographic(x[0], x[0, 1:], threshold=0.0)
