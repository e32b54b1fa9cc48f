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
    result = np.asarray(jax.jit(row.call)({"rewards": rewards}))
    np.testing.assert_allclose(result, row.reference({"rewards": rewards}), rtol=1e-5, atol=1e-6)
    assert result[0, 3] == 0 and not np.any(result[2])


@pytest.mark.parametrize("name", TestRows.rows)
def test_equal_rewards_give_exactly_0(name):
    result = jax.jit(TestRows.rows[name].call)({"rewards": np.full((2, 3, 5), 0.1, np.float32)}, eps=0.0)
    np.testing.assert_array_equal(result, np.zeros((2, 3)))


@pytest.mark.parametrize("name", TestRows.rows)
def test_a_group_of_one_and_other_weights_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: .*at least 2 samples"):
        TestRows.rows[name].call({"rewards": jnp.ones((3, 1, 5))})
    with pytest.raises(Exception, match=r"shape|type"):
        getattr(advantages, name)(jnp.ones((3, 2, 5)), jnp.ones(4))


def test_only_normalised_rewards_keep_the_small_one_apart():
    """Two rewards, one a thousand times the other: their sum hides which answers had the small one."""
    rewards = np.float32([[[1000.0, 1.0], [1000.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    both = jax.jit(lambda x, w: (advantages.multi_reward_sum(x, w), advantages.multi_reward_normalised(x, w)))
    (summed,), (apart,) = jax.tree.map(np.asarray, both(rewards, np.ones(2, np.float32)))
    assert abs(summed[0] - summed[1]) < 0.01 and abs(apart[0] - apart[1]) > 1.0
    np.testing.assert_allclose(apart[1], apart[2], atol=1e-3)  # up to eps


def test_they_are_constants():
    x = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)

    @jax.jit
    def gradients(x, w):
        functions = (advantages.multi_reward_sum, advantages.multi_reward_normalised)
        return [jax.grad(lambda x, w, f=f: jnp.sum(f(x, w) ** 2), (0, 1))(x, w) for f in functions]

    assert not any(np.any(g) for g in jax.tree.leaves(jax.tree.map(np.asarray, gradients(x, np.ones(2, np.float32)))))
