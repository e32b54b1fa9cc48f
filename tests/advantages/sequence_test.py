"""Advantages from rewards to go: equality with the loop, rows that could not be scored, what whitening gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, boolean, by_position, real, tokenwise
from references import advantages as references

from alignax import advantages

REWARDS = {"rewards": Input(make=real)}


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "remax": Row(
            advantages.remax,
            by_position(advantages.remax, "rewards", "baseline", "mask"),
            references.remax,
            REWARDS | {"baseline": Input("B", None, make=real)},
        ),
        "reinforce_plus_plus": Row(
            advantages.reinforce_plus_plus,
            tokenwise(advantages.reinforce_plus_plus, "rewards"),
            references.reinforce_plus_plus,
            REWARDS,
            {"gamma": 0.9, "eps": 0.1},
            coupled=True,
            rtol=1e-5,
        ),
        "reinforce_plus_plus_baseline": Row(
            advantages.reinforce_plus_plus_baseline,
            by_position(advantages.reinforce_plus_plus_baseline, "rewards", "mask"),
            references.reinforce_plus_plus_baseline,
            {"rewards": Input("B K", None, make=real), "mask": Input("B K T", None, make=boolean)},
            {"eps": 0.1},
            coupled=True,
            rtol=1e-5,
        ),
    }

    def test_bad_shapes_are_refused(self, row):
        if row.inputs["rewards"].axes == "B T":
            return super().test_bad_shapes_are_refused(row)
        rewards, mask = np.ones((4, 3), np.float32), np.ones((4, 3, 6), np.float32)
        for bad in ((rewards[:, :-1], mask), (rewards[0], mask), (rewards, mask[0]), (rewards, mask[:-1])):
            with pytest.raises(Exception, match=r"rank|shape|type"):
                jax.eval_shape(row.function, *bad)


def test_rows_that_could_not_be_scored_take_no_part():
    rng = np.random.default_rng(0)
    rewards, mask = rng.normal(size=(4, 5)).astype(np.float32), np.arange(5) < np.array([[5], [3], [4], [2]])
    rewards[1, 2] = np.nan  # where the mask is on
    rewards[3, 4] = np.nan  # where it is off
    rest = np.array([0, 2, 3])
    baseline = np.float32([0.5, 0.5, np.nan, 0.5])

    @jax.jit
    def run(rewards, mask, baseline):
        plus_plus = advantages.reinforce_plus_plus
        alone = plus_plus(rewards[rest], mask[rest])
        return plus_plus(rewards, mask), alone, advantages.remax(rewards, baseline, mask)

    result, alone, against_baseline = jax.tree.map(np.asarray, run(rewards, mask, baseline))
    np.testing.assert_array_equal(result[1], np.zeros(5))
    np.testing.assert_allclose(result[rest], alone, rtol=1e-5, atol=1e-6)
    result = against_baseline
    np.testing.assert_array_equal(result[1:3], np.zeros((2, 5)))
    np.testing.assert_allclose(result[0, 4], rewards[0, 4] - 0.5, rtol=1e-6)


def test_an_answer_without_a_reward_takes_no_part():
    mask = np.arange(5) < np.array([[[5], [3], [4]], [[2], [0], [5]]])
    rewards = np.float32([[1.0, np.nan, 0.0], [2.0, 5.0, 1.0]])
    result = np.asarray(jax.jit(advantages.reinforce_plus_plus_baseline)(rewards, mask))
    expected = references.reinforce_plus_plus_baseline({"rewards": rewards, "mask": mask})
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(result[0, 1])
    chosen = result[mask & ~np.isnan(rewards)[:, :, None]]
    np.testing.assert_allclose([chosen.mean(), chosen.std(ddof=1)], [0.0, 1.0], atol=1e-5)
    with pytest.raises(ValueError, match="at least 2 samples"):
        advantages.reinforce_plus_plus_baseline(jnp.asarray(rewards[:, :1]), jnp.asarray(mask[:, :1]))


def test_equal_rewards_teach_nothing():
    rewards, mask = np.full((2, 3), 0.1, np.float32), np.ones((2, 3, 4), np.float32)
    found = jax.jit(advantages.reinforce_plus_plus_baseline)(rewards, mask)
    np.testing.assert_array_equal(found, np.zeros((2, 3, 4)))


def test_they_are_constants():
    x, b = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32), np.ones(2, np.float32)

    @jax.jit
    def gradients(x, b):
        mask = jnp.ones((2, 3))
        return (
            *jax.grad(lambda x, b: jnp.sum(advantages.remax(x, b, mask)), (0, 1))(x, b),
            jax.grad(lambda x: jnp.sum(advantages.reinforce_plus_plus(x, mask) ** 2))(x),
        )

    assert not any(np.any(np.asarray(gradient)) for gradient in gradients(x, b))
