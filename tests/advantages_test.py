import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import advantages


def loop_gae(rewards, values, mask, gamma, lambda_, bootstrap):
    """From the definition: delete the masked-out tokens, then sum (gamma lambda)^k delta_{t+k}."""
    result = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        chosen = np.flatnonzero(mask[b])
        r, v = rewards[b, chosen], np.append(values[b, chosen], bootstrap[b])
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        for i, t in enumerate(chosen):
            result[b, t] = sum((gamma * lambda_) ** (k - i) * delta[k] for k in range(i, len(r)))
    return result


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_definition(gamma, lambda_):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 5, 9)).astype(np.float32)
    mask, bootstrap = rng.random((5, 9)) < 0.6, rng.normal(size=5).astype(np.float32)
    mask[1] = False
    garbage = [jnp.where(mask, x, jnp.nan) for x in (rewards, values)]
    gae = jax.jit(advantages.gae)
    advantage, returns = gae(
        *garbage, jnp.asarray(mask), gamma=gamma, lambda_=lambda_, bootstrap=jnp.asarray(bootstrap)
    )
    expected = loop_gae(rewards, values, mask, gamma, lambda_, bootstrap)
    np.testing.assert_allclose(advantage, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), rtol=1e-5, atol=1e-6)


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    rewards, values = jnp.array([[0.1, 0.2, 1.0]]), jnp.array([[0.3, 0.5, 0.7]])
    advantage, returns = advantages.gae(rewards, values, jnp.ones((1, 3)), lambda_=1.0)
    np.testing.assert_allclose(returns, [[1.3, 1.2, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(advantage, [[1.0, 0.7, 0.3]], rtol=1e-6)


def test_advantages_are_constants():
    x = jnp.ones((2, 3))
    gradient = jax.grad(lambda v: sum(jnp.sum(y) for y in advantages.gae(x, v, x)))(x)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))
    gradient = jax.grad(lambda r: jnp.sum(advantages.group_relative(r) ** 2))(jnp.array([[1.0, 2.0]]))
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))


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
