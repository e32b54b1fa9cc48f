"""The draw of a token: its frequencies, and what it must never return."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.sampling import draw

ALMOST_ONE = float(np.nextafter(np.float32(1), np.float32(0)))


categorical = jax.jit(lambda *args: draw.categorical(*args)[0])


def drawn(p, uniform, limit=np.inf):
    with np.errstate(divide="ignore"):
        gap = np.log(np.max(p)) - np.log(np.asarray(p, np.float64))
    rows = len(uniform)
    gap = np.broadcast_to(gap.astype(np.float32), (rows, len(p)))
    return np.asarray(categorical(gap, np.full(rows, limit, np.float32), np.asarray(uniform, np.float32)))


@pytest.mark.parametrize("size", [2, 128, 129, 700])
def test_frequencies(size, key):
    p = np.random.default_rng(size).dirichlet(np.full(size, 0.3))
    count = 200_000
    uniform = jax.random.uniform(key, (count, 2))
    observed = np.bincount(
        np.concatenate([drawn(p, part) for part in np.split(np.asarray(uniform), 20)]), minlength=size
    )
    sigma = np.sqrt(count * p * (1 - p))
    assert observed.sum() == count
    # 3 sigma for each of the ten likeliest tokens, and chi^2 for all (the normal approximation of its tail at 4 sigma)
    likely = np.argsort(-p)[:10]
    assert np.all(np.abs(observed - count * p)[likely] <= 3.3 * sigma[likely] + 1)
    common = p * count > 5
    chi = np.sum((observed - count * p)[common] ** 2 / (count * p[common]))
    assert chi <= common.sum() + 4 * np.sqrt(2 * common.sum())


def test_is_the_inverse_of_the_cumulative_distribution():
    p = np.random.default_rng(0).dirichlet(np.ones(300))
    blocks = [p[:128], p[128:256], p[256:]]
    weights = np.array([block.sum() for block in blocks])
    uniform = np.random.default_rng(1).uniform(size=(4000, 2)).astype(np.float32)
    first = np.searchsorted(np.cumsum(weights), uniform[:, 0] * weights.sum(), side="right")
    second = [
        np.searchsorted(np.cumsum(blocks[b]), u * blocks[b].sum(), side="right") for b, u in zip(first, uniform[:, 1])
    ]
    expected = 128 * first + np.array(second)
    assert np.mean(drawn(p, uniform) == expected) >= 0.999  # a number within rounding of a border may fall beside it


def test_a_token_of_probability_zero_is_never_drawn():
    grid = [0.0, 1e-30, 0.5, ALMOST_ONE]
    uniform = np.array(list(itertools.product(grid, grid)))
    rng = np.random.default_rng(0)
    for trial in range(30):
        p = np.zeros(500)
        support = rng.choice(500, size=rng.integers(1, 5), replace=False)
        p[support] = 10.0 ** rng.uniform(-30, 0, size=support.size)
        assert set(drawn(p, uniform)) <= set(support)
        assert drawn(p, [(0.0, 0.0)])[0] == support.min(), trial
    # sums whose rounding depends on their order
    p = np.where(np.arange(4096) % 128 < 64, rng.uniform(size=4096), 0.0)
    tokens = drawn(p, np.concatenate([uniform, rng.uniform(size=(2000, 2))]))
    assert np.all(p[tokens] > 0)


def test_the_limit_is_kept():
    gap = jnp.broadcast_to(jnp.arange(400.0) / 100, (1000, 400))
    uniform = jax.random.uniform(jax.random.key(0), (1000, 2))
    tokens = categorical(gap, jnp.full(1000, 1.5), uniform)
    assert np.max(tokens) in range(140, 151)
    assert np.all(categorical(gap, jnp.zeros(1000), uniform) == 0)


def test_rows_without_a_distribution_still_give_a_token():
    gap = jnp.full((3, 200), jnp.nan)
    assert categorical(gap, jnp.full(3, jnp.inf), jnp.full((3, 2), 0.7)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_numbers_belong_to_key_row_and_column(make):
    ids, columns = jnp.array([5, 2, 9, 5]), jnp.array([3, 3, 3, 4])
    numbers = np.asarray(draw.uniforms(draw.row_keys(make(0), ids), columns))
    assert len({tuple(row) for row in numbers}) == 4
    for row, (identity, column) in enumerate(zip(ids, columns)):
        alone = draw.uniforms(draw.row_keys(make(0), identity[None]), column[None])
        np.testing.assert_array_equal(alone[0], numbers[row])
    other = draw.uniforms(draw.row_keys(make(1), ids), columns)
    assert not np.any(np.asarray(other) == numbers)
