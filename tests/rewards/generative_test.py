"""A language model's words as rewards: closed forms, both orders, words that cannot be said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses, rewards

GOOD, BAD = jnp.log(jnp.array([0.6, 0.01])), jnp.log(jnp.array([0.2, 0.04]))


def test_good_and_bad():
    np.testing.assert_allclose(rewards.good_score(GOOD), [0.6, 0.01], rtol=1e-6)
    np.testing.assert_allclose(rewards.good_bad_score(GOOD, BAD), [0.75, 0.2], rtol=1e-6)
    np.testing.assert_allclose(losses.reward_binary(GOOD - BAD, jnp.array([1.0, 0.0])), -np.log([0.75, 0.8]), rtol=1e-6)


def test_a_word_that_cannot_be_said():
    never = jnp.array([-jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(rewards.good_bad_score(GOOD, never), [1.0, 1.0])
    np.testing.assert_array_equal(rewards.good_bad_score(never, never), [0.5, 0.5])
    np.testing.assert_array_equal(rewards.good_score(never), [0.0, 0.0])


def test_both_orders_cancel_the_bias_of_the_first_place():
    bias, fair = 1.0, jnp.array([0.0])
    answer = rewards.ab_preference(fair + bias, fair, fair + bias, fair)
    np.testing.assert_allclose(answer, [0.5], rtol=1e-6)


def test_the_other_answers_preference_is_the_complement():
    a, b, swapped_a, swapped_b = (jnp.array([x]) for x in (-0.3, -1.5, -1.1, -0.4))
    one = rewards.ab_preference(a, b, swapped_a, swapped_b)
    other = rewards.ab_preference(swapped_a, swapped_b, a, b)
    np.testing.assert_allclose(one + other, [1.0], rtol=1e-6)


def test_the_reward_against_a_baseline_is_finite():
    p = jnp.array([0.5, 0.9, 0.0, 1.0])
    clipped = np.log(0.9999 / 0.0001)
    np.testing.assert_allclose(rewards.baseline_reward(p), [0.0, np.log(9), -clipped, clipped], rtol=2e-4)


@pytest.mark.parametrize(
    "function, count",
    [(rewards.good_score, 1), (rewards.good_bad_score, 2), (rewards.ab_preference, 4), (rewards.baseline_reward, 1)],
)
def test_rewards_are_constants_of_one_number_a_row(function, count):
    x = [jnp.array([-0.5, -1.0])] * count
    for slope in jax.grad(lambda x: jnp.sum(function(*x)))(x):
        np.testing.assert_array_equal(slope, [0.0, 0.0])
    with pytest.raises(Exception, match=r"rank|type"):
        function(*[y[None] for y in x])
    if count > 1:
        with pytest.raises(Exception, match=r"shape|type"):
            function(*x[:-1], x[-1][:1])
