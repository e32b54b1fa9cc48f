import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import reduce
from alignax.types import Mean

X = jnp.array([[1.0, 2.0, 3.0, 4.0, jnp.nan], [5.0, -1.0, 2.0, jnp.inf, jnp.nan], [9.0, jnp.nan, 9.0, 9.0, 9.0]])
MASK = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "mean, total, count",
    [
        (reduce.token_mean, 16.0, 7.0),
        (reduce.sequence_mean, 2.5 + 2.0, 2.0),  # the empty row does not count
        (reduce.sequence_sum, 16.0, 2.0),
        (lambda *x: reduce.constant_mean(*x, constant=5), 3.2, 3.0),  # here it does
    ],
)
def test_means_by_hand_never_see_what_is_masked(mean, total, count):
    result = mean(X, MASK)
    np.testing.assert_allclose(result, (total, count), rtol=1e-6)
    gradient = jax.grad(lambda x: mean(x, MASK).value())(X)
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[MASK == 0], jnp.zeros(8))


def test_example_weights():
    weights = jnp.array([2.0, 0.0, 1.0])  # a filler row is not counted and its content does not matter
    x = X.at[1].set(jnp.nan)
    np.testing.assert_allclose(reduce.token_mean(x, MASK, weights), (20.0, 8.0))
    np.testing.assert_allclose(reduce.sequence_mean(x, MASK, weights), (5.0, 2.0))
    np.testing.assert_allclose(reduce.constant_mean(x, MASK, weights, constant=2), (10.0, 3.0))
    np.testing.assert_allclose(reduce.batch_mean(jnp.array([3.0, jnp.nan, 1.0]), weights), (7.0, 3.0))


def test_a_mask_selects_whatever_its_values():
    for mean in (reduce.token_mean, reduce.sequence_mean, reduce.sequence_sum):
        np.testing.assert_array_equal(mean(X, MASK * 2.0), mean(X, MASK))


def test_nothing_counted_is_zero_with_a_zero_gradient():
    empty = jnp.zeros((2, 3))
    for mean in (reduce.token_mean, reduce.sequence_mean, reduce.sequence_sum):
        value, gradient = jax.value_and_grad(lambda x: mean(x, empty).value())(jnp.full((2, 3), jnp.nan))
        assert value == 0
        np.testing.assert_array_equal(gradient, empty)
    assert Mean(jnp.array(0.0), jnp.array(0.0)).value() == 0


def test_parts_add_up_exactly():
    whole = reduce.token_mean(X, MASK)
    parts = [reduce.token_mean(X[i : i + 1], MASK[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(sum(part.total for part in parts) / sum(part.count for part in parts), whole.value())


@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten(ddof):
    chosen = np.array([1.0, 2, 3, 4, 5, -1, 2])
    expected = (chosen - chosen.mean()) / np.sqrt(chosen.var(ddof=ddof) + 1e-8)
    whitened = reduce.whiten(X, MASK, ddof=ddof)
    np.testing.assert_allclose(whitened[MASK == 1], expected, rtol=1e-5)
    np.testing.assert_array_equal(whitened[MASK == 0], np.zeros(8))
    kept = reduce.whiten(X, MASK, ddof=ddof, shift_mean=False)
    np.testing.assert_allclose(kept[MASK == 1], expected + chosen.mean(), rtol=1e-5)


def test_whiten_without_spread():
    np.testing.assert_array_equal(reduce.whiten(jnp.ones((1, 3)), jnp.ones((1, 3))), np.zeros((1, 3)))
    np.testing.assert_array_equal(reduce.whiten(X[:1], jnp.zeros((1, 5)).at[0, 0].set(1)), np.zeros((1, 5)))
    # a rounded mean of equal numbers differs from them by an ulp: 0.06 here, many standard deviations of sqrt(eps)
    np.testing.assert_array_equal(reduce.whiten(jnp.full((1, 7), 1e6 + 0.3), jnp.ones((1, 7))), np.zeros((1, 7)))


def test_variance_and_centre():
    chosen = np.array([1.0, 2, 3, 4, 5, -1, 2])
    for ddof in (0, 1):
        np.testing.assert_allclose(reduce.variance(X, MASK, ddof=ddof), chosen.var(ddof=ddof), rtol=1e-6)
    centred = reduce.centre(X, MASK)
    np.testing.assert_allclose(centred[MASK == 1], chosen - chosen.mean(), rtol=1e-5)
    np.testing.assert_array_equal(centred[MASK == 0], np.zeros(8))
    far = jnp.array([[1e4, 1e4 + 0.25, 1e4 + 0.5]])  # a mean of squares less a squared mean would give 0 or 8
    np.testing.assert_allclose(reduce.variance(far, jnp.ones((1, 3))), 0.0625, rtol=1e-6)
    assert reduce.variance(X, jnp.zeros(MASK.shape)) == 0


def test_explained_variance():
    returns, mask = jnp.array([[1.0, 2.0, 4.0, jnp.nan]]), jnp.array([[1, 1, 1, 0]])
    for values, expected in (([1, 2, 4, 9], 1.0), ([3, 3, 3, 9], 0.0), ([-1, -2, -4, 9], -3.0)):
        values = jnp.array([values], jnp.float32)
        np.testing.assert_allclose(reduce.explained_variance(values, returns, mask), expected, atol=1e-6)
    assert reduce.explained_variance(returns, jnp.ones((1, 4)), mask) == 0


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
def test_top_entropy(fraction):
    rng = np.random.default_rng(0)
    entropy, mask = rng.random((4, 9)).astype(np.float32), rng.random((4, 9)) < 0.7
    dirty = jnp.where(mask, entropy, jnp.nan)
    expected = mask & (entropy >= np.quantile(entropy[mask], 1 - fraction))
    top = jax.jit(reduce.top_entropy)
    np.testing.assert_array_equal(top(dirty, jnp.asarray(mask), fraction=fraction), expected)
    np.testing.assert_array_equal(top(dirty, jnp.zeros((4, 9)), fraction=fraction), np.zeros((4, 9), bool))


def test_top_entropy_keeps_the_token_at_the_quantile():
    # where the quantile is a token, rounding must not drop it: of 5 n + 1 tokens two fifths lie above the one there
    entropy, top = jnp.arange(201, dtype=jnp.float32)[None], jax.jit(reduce.top_entropy)
    for count in range(1, 41):
        assert jnp.sum(top(entropy, entropy <= 5 * count, fraction=0.4)) == 2 * count + 1


def test_shapes_are_refused():
    with pytest.raises(AssertionError):
        reduce.token_mean(X, MASK[:, :-1])
    with pytest.raises(AssertionError):
        reduce.token_mean(X, MASK, jnp.ones(2))
