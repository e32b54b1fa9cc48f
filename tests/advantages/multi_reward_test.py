"""Advantages from several rewards: equality with the loop, rewards that are missing, what sets the two apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, real
from references import advantages as references

from alignax import advantages

WEIGHTS = np.float32([1.0, 0.5, -2.0, 0.3, 0.0])


def weighted(function):
    """The function of rewards alone: weights belong to rewards, not to rows."""
    return lambda x, **hyper: function(x["rewards"], jnp.asarray(WEIGHTS), **hyper)


def loop(reference):
    return lambda x, **hyper: reference(x, WEIGHTS.astype(np.float64), **hyper)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        name: Row(
            getattr(advantages, name),
            weighted(getattr(advantages, name)),
            loop(getattr(references, name)),
            {"rewards": Input("B K V", None, make=real)},
            {"eps": 0.2, "ddof": 0.5},
            coupled=coupled,
            rtol=5e-6,
        )
        for name, coupled in (("multi_reward_sum", False), ("multi_reward_normalised", True))
    }


@pytest.mark.parametrize("name", TestRows.rows)
def test_missing_rewards(name):
    """One reward of an answer, all of an answer, one of a whole group, all of a group."""
    rewards = np.random.default_rng(0).normal(size=(4, 4, 5)).astype(np.float32)
    rewards[0, 1, 2] = rewards[0, 3] = rewards[1, :, 0] = rewards[2] = np.nan
    row = TestRows.rows[name]
    result = row.call({"rewards": jnp.asarray(rewards)})
    np.testing.assert_allclose(result, row.reference({"rewards": rewards}), rtol=1e-5, atol=1e-6)
    assert result[0, 3] == 0 and not np.any(result[2])


@pytest.mark.parametrize("name", TestRows.rows)
def test_equal_rewards_give_exactly_0(name):
    result = TestRows.rows[name].call({"rewards": jnp.full((2, 3, 5), 0.1)}, eps=0.0)
    np.testing.assert_array_equal(result, np.zeros((2, 3)))


@pytest.mark.parametrize("name", TestRows.rows)
def test_a_group_of_one_and_other_weights_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: .*at least 2 samples"):
        TestRows.rows[name].call({"rewards": jnp.ones((3, 1, 5))})
    with pytest.raises(Exception, match=r"shape|type"):
        getattr(advantages, name)(jnp.ones((3, 2, 5)), jnp.ones(4))


def test_only_normalised_rewards_keep_the_small_one_apart():
    """Two rewards, one a thousand times the other: their sum hides which answers had the small one."""
    rewards = jnp.array([[[1000.0, 1.0], [1000.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    summed = advantages.multi_reward_sum(rewards, jnp.ones(2))[0]
    apart = advantages.multi_reward_normalised(rewards, jnp.ones(2))[0]
    assert abs(summed[0] - summed[1]) < 0.01 and abs(apart[0] - apart[1]) > 1.0
    np.testing.assert_allclose(apart[1], apart[2], atol=1e-3)  # up to eps


def test_they_are_constants():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2)), jnp.float32)
    for f in (advantages.multi_reward_sum, advantages.multi_reward_normalised):
        gradients = jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), (0, 1))(x, jnp.ones(2))
        assert not any(np.any(g) for g in gradients)
