"""Ensembles of reward models against numpy; a single model; who decides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import rewards

SCORES = np.array([[1.0, -0.5, 2.0], [1.0, 0.5, -4.0], [1.0, 0.0, 2.5], [1.0, 1.0, 3.0]], np.float32)
FUNCTIONS = (
    rewards.ensemble_mean,
    rewards.ensemble_min,
    rewards.ensemble_variance_penalised,
    rewards.ensemble_lower_bound,
)


def test_against_numpy():
    mean, x = SCORES.mean(0), jnp.asarray(SCORES)
    np.testing.assert_allclose(rewards.ensemble_mean(x), mean, rtol=1e-6)
    np.testing.assert_array_equal(rewards.ensemble_min(x), SCORES.min(0))
    for ddof in (0, 1):
        penalised = rewards.ensemble_variance_penalised(x, penalty=0.3, ddof=ddof)
        np.testing.assert_allclose(penalised, mean - 0.3 * SCORES.var(0, ddof=ddof), rtol=1e-5)
        bound = rewards.ensemble_lower_bound(x, deviations=2.0, ddof=ddof)
        np.testing.assert_allclose(bound, mean - 2 * SCORES.std(0, ddof=ddof), rtol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_single_model_and_models_that_agree_are_that_model(function):
    one = jnp.asarray(SCORES[:1])
    np.testing.assert_array_equal(function(one), one[0])
    np.testing.assert_allclose(function(jnp.repeat(one, 3, axis=0)), one[0], rtol=1e-6)
    for ddof in (0, 1) if function in FUNCTIONS[2:] else ():
        np.testing.assert_array_equal(function(one, ddof=ddof), one[0])


def test_the_cautious_ones_distrust_what_one_model_likes():
    agreed, doubtful = jnp.full((4,), 0.5), jnp.array([4.0, 0.0, -0.5, -0.5])
    scores = jnp.stack([agreed, doubtful], axis=1)
    assert rewards.ensemble_mean(scores)[1] > rewards.ensemble_mean(scores)[0]
    for function in FUNCTIONS[1:]:
        assert function(scores)[1] < function(scores)[0]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scores_are_constants(function):
    slope = jax.grad(lambda x: jnp.sum(function(x)))(jnp.asarray(SCORES))
    np.testing.assert_array_equal(slope, np.zeros(SCORES.shape))


def test_bad_arguments_are_refused():
    for function in FUNCTIONS:
        with pytest.raises(Exception, match=r"rank|type"):
            function(jnp.zeros(3))
    with pytest.raises(ValueError, match="ddof=2; expected 0 or 1"):
        rewards.ensemble_lower_bound(jnp.asarray(SCORES), ddof=2)


def test_the_penalty_is_traced():
    traces = []

    @jax.jit
    def run(penalty):
        traces.append(1)
        return rewards.ensemble_variance_penalised(jnp.asarray(SCORES), penalty=penalty)

    assert run(0.1)[2] > run(0.5)[2] and len(traces) == 1
