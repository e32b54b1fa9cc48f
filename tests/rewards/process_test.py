"""Scores and labels of steps against plain Python; rows without steps; masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import rewards

RNG = np.random.default_rng(0)
SCORES = RNG.uniform(0.1, 1.0, (5, 4)).astype(np.float32)
MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0]])
EXPECTED = {
    rewards.process_product: np.prod,
    rewards.process_min: np.min,
    rewards.process_mean: np.mean,
    rewards.process_last: lambda steps: steps[-1],
}


@pytest.mark.parametrize("function", EXPECTED)
def test_a_solution_is_scored_by_its_own_steps(function):
    expected = [EXPECTED[function](row[m]) if m.any() else 0.0 for row, m in zip(SCORES, MASK != 0, strict=True)]
    mask = jnp.asarray(MASK)
    np.testing.assert_allclose(function(jnp.asarray(SCORES), mask), expected, rtol=1e-6)
    dirty = np.where(MASK, SCORES, np.nan)
    np.testing.assert_allclose(jax.jit(function)(jnp.asarray(dirty), mask), expected, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(function(x, mask)))(jnp.asarray(SCORES))
    np.testing.assert_array_equal(slope, np.zeros(SCORES.shape))
    for bad in (mask[:, 1:], mask[0]):
        with pytest.raises(Exception, match=r"rank|shape|type"):
            function(jnp.asarray(SCORES), bad)


def test_monte_carlo_labels():
    correct = jnp.array([[[True, True, False, True], [False] * 4], [[False, True, False, False], [True] * 4]])
    np.testing.assert_array_equal(rewards.monte_carlo_hard(correct), [[1, 0], [1, 1]])
    np.testing.assert_array_equal(rewards.monte_carlo_soft(correct), [[0.75, 0], [0.25, 1]])


@pytest.mark.parametrize(
    "neutral, labels, counted",
    [
        (1.0, [[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]),
        (0.5, [[1, 0.5, 0, 0], [0.5, 1, 1, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]),
        (None, [[1, 0, 0, 0], [0, 1, 1, 0]], [[1, 0, 1, 0], [0, 1, 1, 0]]),
    ],
)
def test_labels_end_with_the_first_error(neutral, labels, counted):
    ratings = jnp.array([[1.0, 0.0, -1.0, 1.0], [0.0, 1.0, 1.0, jnp.nan]])
    found, mask = rewards.rated_labels(ratings, jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]]), neutral=neutral)
    np.testing.assert_array_equal(found, labels)
    np.testing.assert_array_equal(mask, np.array(counted, bool))
