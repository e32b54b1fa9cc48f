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
    @jax.jit
    def gradients(x, rewards):
        return (
            jax.grad(lambda v: sum(jnp.sum(y) for y in advantages.gae(x, v, x)))(x),
            jax.grad(lambda r: jnp.sum(advantages.group_relative(r) ** 2))(rewards),
        )

    by_values, by_rewards = gradients(np.ones((2, 3), np.float32), np.float32([[1, 2]]))
    np.testing.assert_array_equal(by_values, np.zeros((2, 3)))
    np.testing.assert_array_equal(by_rewards, np.zeros((1, 2)))
