"""What is particular to advantages within a group: closed forms, rewards that are missing, refusals."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from alignax import advantages


def test_group_relative():
    rewards = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    centred = rewards - rewards.mean(1, keepdims=True)
    expected = centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(advantages.group_relative(jnp.asarray(rewards)), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(advantages.group_centred(jnp.asarray(rewards)), centred, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8])
def test_a_group_without_spread_has_advantage_exactly_0(reward):
    rewards = jnp.full((2, 7), reward)
    np.testing.assert_array_equal(advantages.group_relative(rewards, eps=1e-9), np.zeros((2, 7)))


def test_large_rewards_that_differ_little():
    rewards = jnp.array([[1e6, 1e6, 1e6 + 0.0625, 1e6]])
    np.testing.assert_allclose(advantages.group_centred(rewards), [[-1 / 64, -1 / 64, 3 / 64, -1 / 64]], rtol=1e-6)


def test_an_answer_without_a_reward_is_left_out():
    rewards = jnp.array([[1.0, jnp.nan, 0.0, 1.0], [jnp.nan] * 4, [2.0, jnp.nan, jnp.nan, jnp.nan]])
    result = advantages.group_relative(rewards)
    np.testing.assert_allclose(result[0], [0.57725, 0.0, -1.154501, 0.57725], atol=1e-5)
    np.testing.assert_array_equal(result[1:], np.zeros((2, 4)))


def test_a_group_of_one_is_refused():
    for function in (advantages.group_relative, advantages.group_centred):
        with pytest.raises(ValueError, match=r"shape \(3, 1\).*at least 2 samples"):
            function(jnp.ones((3, 1)))


def test_vectors(shared):
    used = 0
    for vector in json.loads((shared / "spec" / "vectors_online.json").read_text()):
        x, hyper, expected = vector["inputs"], vector["hyperparameters"], vector["expected"]
        if vector["function"] == "grpo_advantages" and hyper["scale"] != "batch":
            rewards = jnp.array([float(r) for r in x["rewards"]]).reshape(-1, hyper["group_size"])
            if hyper["scale"] == "none":
                result = advantages.group_centred(rewards).ravel()
            else:
                result = advantages.group_relative(rewards, eps=hyper["eps"], ddof=hyper["ddof"]).ravel()
        else:
            continue
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6, err_msg=vector["id"])
        used += 1
    assert used == 5
