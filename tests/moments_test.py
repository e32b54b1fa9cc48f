import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import moments


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7), (3, 0, 8, 1)])
def test_any_split_gives_the_moments_of_the_whole(sizes):
    x = np.random.default_rng(0).normal(100, 0.5, sum(sizes)).astype(np.float32)
    running, start, update = moments.Moments.init(), 0, jax.jit(moments.update_moments)
    for size in sizes:
        running = update(running, jnp.asarray(x[start : start + size]))
        start += size
    assert running.count == len(x)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(running.mean, exact.mean(), rtol=1e-6)
    for ddof in (0, 1):
        np.testing.assert_allclose(running.variance(ddof), exact.var(ddof=ddof), rtol=1e-4)
        np.testing.assert_allclose(running.std(ddof), exact.std(ddof=ddof), rtol=1e-4)


def test_weights_leave_out_and_repeat():
    update = jax.jit(moments.update_moments)
    x, weights = jnp.array([1.0, jnp.nan, 4.0]), jnp.array([2.0, 0.0, 1.0])
    running = update(moments.Moments.init(), x, weights)
    np.testing.assert_allclose(running, (3.0, 2.0, 6.0), rtol=1e-6)
    np.testing.assert_array_equal(jnp.stack(update(running, x, 0 * weights)), jnp.stack(running))


def test_nan_never_counts():
    x, update = jnp.array([1.0, jnp.nan, 3.0]), jax.jit(moments.update_moments)
    for weights in (None, jnp.ones(3)):
        np.testing.assert_allclose(update(moments.Moments.init(), x, weights), (2.0, 2.0, 2.0), rtol=1e-6)


def test_no_spread_is_0():
    running = moments.Moments.init()
    assert running.variance() == 0 and running.std() == 0
    assert moments.update_moments(running, jnp.array([3.0])).variance() == 0


def test_a_million_updates_do_not_drift():
    def step(running, x):
        return moments.update_moments(running, x), None

    x = jnp.array([999.0, 1001.0])
    running, _ = jax.lax.scan(lambda running, _: step(running, x), moments.Moments.init(), length=100_000)
    np.testing.assert_allclose((running.mean, running.variance(0)), (1000.0, 1.0), rtol=1e-3)


def exponential(batches, beta):
    """Debiased averages of mean and mean square in float64, as ReaLHF keeps them: mean and variance."""
    mean = square = weight = 0.0
    for batch in batches:
        mean = beta * mean + (1 - beta) * np.mean(batch)
        square = beta * square + (1 - beta) * np.mean(np.square(batch))
        weight = beta * weight + 1 - beta
    return mean / weight, square / weight - (mean / weight) ** 2


@pytest.mark.parametrize("beta, rtol", [(0.5, 1e-5), (0.99995, 1e-4)])
def test_value_norm_is_debiased(beta, rtol):
    rng = np.random.default_rng(0)
    batches = rng.normal(50, 0.3, (6, 2, 8)).astype(np.float32) + np.arange(6, dtype=np.float32)[:, None, None]
    mask = rng.random((6, 2, 8)) < 0.7
    mask[3] = False  # changes nothing
    norm, update = moments.ValueNorm.init(), jax.jit(moments.value_norm_update)
    for batch, chosen in zip(batches, mask, strict=True):
        norm = update(norm, jnp.where(chosen, batch, jnp.nan), jnp.asarray(chosen), beta=beta)
    pairs = zip(batches.astype(np.float64), mask, strict=True)
    mean, variance = exponential([batch[chosen] for batch, chosen in pairs if chosen.any()], beta)
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(norm.variance, variance, rtol=rtol)


def test_value_norm_there_and_back():
    x = jnp.array([[3.0, -1.0, 0.25]])
    norm = moments.ValueNorm.init()
    np.testing.assert_array_equal(moments.normalise(norm, x), x)  # before the first update
    norm = moments.value_norm_update(norm, jnp.array([[10.0, 14.0, jnp.nan]]), jnp.array([[1, 1, 0]]))
    np.testing.assert_allclose(moments.normalise(norm, jnp.array([10.0, 12.0, 16.0])), [-1, 0, 2], atol=1e-5)
    np.testing.assert_allclose(moments.denormalise(norm, x), 2 * x + 12, rtol=1e-5)
    np.testing.assert_allclose(moments.normalise(norm, moments.denormalise(norm, x)), x, rtol=1e-5)
    np.testing.assert_allclose(moments.denormalise(norm, moments.normalise(norm, x)), x, rtol=1e-5)


def test_value_norm_of_equal_returns_divides_by_the_floor():
    norm = moments.value_norm_update(moments.ValueNorm.init(), jnp.full((1, 4), 7.0), jnp.ones((1, 4)))
    np.testing.assert_allclose(moments.normalise(norm, jnp.array([7.0, 8.0]), eps=0.25), [0.0, 2.0], atol=1e-5)


def test_an_empty_first_batch_leaves_nothing_behind():
    empty = moments.value_norm_update(moments.ValueNorm.init(), jnp.full((1, 2), jnp.nan), jnp.zeros((1, 2)))
    np.testing.assert_array_equal(jnp.stack(empty), np.zeros(3))


def test_bad_shapes_are_refused():
    with pytest.raises(Exception, match=r"shape|type"):
        moments.update_moments(moments.Moments.init(), jnp.zeros(3), jnp.zeros(2))
    with pytest.raises(Exception, match=r"shape|type"):
        moments.value_norm_update(moments.ValueNorm.init(), jnp.zeros((2, 3)), jnp.zeros((2, 2)))
