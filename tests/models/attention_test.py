"""Attention and its cache against numpy: grouped queries, rows that see nothing, where a token is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import attention

B, T, S, H, KV, D = 2, 3, 5, 6, 2, 4


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"q": (B, T, H, D), "k": (B, S, KV, D), "v": (B, S, KV, D)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return arrays | {"visible": np.tril(np.ones((B, T, S), bool), 1)}


def attend(q, k, v, visible, **options):
    cache = attention.as_cache(jnp.asarray(k), jnp.asarray(v))
    return attention.attend(jnp.asarray(q), cache, jnp.asarray(visible), **options)


@pytest.mark.parametrize("scalar, softcap", [(None, None), (9.0, None), (None, 0.8), (9.0, 0.8)])
def test_attend_query_by_query(arrays, scalar, softcap):
    q, k, v, visible = arrays.values()
    found = attend(q, k, v, visible, scalar=scalar, softcap=softcap)
    for b, t, h in np.ndindex(B, T, H):
        seen = np.flatnonzero(visible[b, t])
        scores = k[b, seen, h // 3].astype(np.float64) @ q[b, t, h] / (3 if scalar else 2)
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores) / np.sum(np.exp(scores))
        np.testing.assert_allclose(found[b, t, h], weights @ v[b, seen, h // 3], atol=1e-6)


def test_large_scores_do_not_overflow(arrays):
    q, k, v, visible = arrays.values()
    found = attend(300 * q, 300 * k, v, visible)
    best = np.argmax(np.where(visible[0, 2], k[0, :, 0].astype(np.float64) @ q[0, 2, 0], -np.inf))
    np.testing.assert_allclose(found[0, 2, 0], v[0, best, 0], atol=1e-6)


def test_what_is_unseen_has_neither_value_nor_gradient(arrays):
    q, k, v, visible = arrays.values()
    visible[1, 2] = False  # a row that sees nothing
    grads = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, visible)[0] ** 2), (0, 1, 2))(q, k, v)
    assert all(np.all(np.isfinite(grad)) and np.any(grad != 0) for grad in grads)
    assert not np.any(grads[1][:, 4]) and not np.any(grads[2][:, 4])
    assert np.all(np.isfinite(attend(q, k, v, visible)))
    other = attend(q, np.where(np.arange(S)[None, :, None, None] == 4, 1e4, k), v, visible)
    np.testing.assert_array_equal(other[0], attend(q, k, v, visible)[0])


def test_write_puts_each_token_in_its_slot(arrays):
    k, v = arrays["k"][:, :2], arrays["v"][:, :2]
    empty = attention.LayerCache(jnp.full((B, KV, D, S), 7.0), jnp.full((B, KV, S, D), 7.0))
    slots = np.array([[3, 0], [1, 9]])  # the last lies outside and is dropped
    written = attention.write(empty, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots))
    keys, values = np.full((B, S, KV, D), 7.0), np.full((B, S, KV, D), 7.0)
    for row, token in [(0, 0), (0, 1), (1, 0)]:
        keys[row, slots[row, token]], values[row, slots[row, token]] = k[row, token], v[row, token]
    np.testing.assert_array_equal(written.keys, keys.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(written.values, values.transpose(0, 2, 1, 3))


def test_write_front_is_write_at_the_first_slots(arrays):
    k, v = jnp.asarray(arrays["k"][:, :2]), jnp.asarray(arrays["v"][:, :2])
    empty = attention.LayerCache(jnp.full((B, KV, D, S), 7.0), jnp.full((B, KV, S, D), 7.0))
    front = attention.write_front(empty, attention.as_cache(k, v))
    slots = jnp.broadcast_to(jnp.arange(2), (B, 2))
    jax.tree.map(np.testing.assert_array_equal, front, attention.write(empty, k, v, slots))
