"""Preferences against loops over numbers; what a preference function may return; both orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import rewards


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(2, 4, 4)).astype(np.float32)


@pytest.mark.parametrize("function", [rewards.symmetric_preference, rewards.symmetric_preference_mean])
def test_the_order_shown_does_not_matter(function, logits):
    p = function(jnp.asarray(logits), jnp.asarray(logits.swapaxes(1, 2)))
    np.testing.assert_allclose(p + p.swapaxes(1, 2), 1.0, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jnp.diag)(p), 0.5, rtol=1e-6)  # identical candidates, whatever their logit
    with pytest.raises(AssertionError):
        function(jnp.zeros(3), jnp.zeros(2))


def test_two_ways_to_be_symmetric():
    logits = jnp.array(1.0), jnp.array(-0.6)
    np.testing.assert_allclose(rewards.symmetric_preference(*logits), sigmoid(0.8), rtol=1e-6)
    expected = (sigmoid(1.0) + 1 - sigmoid(-0.6)) / 2
    np.testing.assert_allclose(rewards.symmetric_preference_mean(*logits), expected, rtol=1e-6)


def test_pairwise_scores(logits):
    expected = np.zeros((2, 4))
    for b, i, j in np.ndindex(2, 4, 4):
        expected[b, i] += (float(logits[b, i, j]) - float(logits[b, j, i])) / 4
    np.testing.assert_allclose(rewards.pairwise_scores(jnp.asarray(logits)), expected, rtol=1e-5, atol=1e-6)
    dirty = np.where(np.eye(4, dtype=bool), np.nan, logits)
    np.testing.assert_allclose(rewards.pairwise_scores(jnp.asarray(dirty)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("include_self", [True, False])
def test_win_rates(include_self):
    scores = np.array([[1.0, 0.2, -0.5], [3.0, 3.0, 3.0]])
    expected = np.zeros((2, 3))
    for b, i in np.ndindex(2, 3):
        others = [sigmoid(scores[b, i] - scores[b, j]) for j in range(3) if include_self or i != j]
        expected[b, i] = np.mean(others)
    found = rewards.win_rates(jnp.asarray(scores), include_self=include_self)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(found.mean(axis=1), 0.5, rtol=1e-6)  # the baseline of SPPO, either way
    matrix = np.where(np.eye(3, dtype=bool), 0.9, np.asarray(rewards.preference_matrix(jnp.asarray(scores))))
    np.testing.assert_allclose(rewards.mean_win_rates(jnp.asarray(matrix), include_self=include_self), expected, 1e-6)


def test_win_rates_of_what_no_score_explains():
    rock_paper_scissors = jnp.array([[[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]])
    np.testing.assert_allclose(rewards.mean_win_rates(rock_paper_scissors), 0.5)
    with pytest.raises(ValueError, match=r"mean_win_rates: preferences .*1\.5.*; expected probabilities, from 0 to 1"):
        rewards.mean_win_rates(rock_paper_scissors * 1.5)
    with pytest.raises(ValueError, match="one candidate and include_self=False; expected 2"):
        rewards.win_rates(jnp.zeros((2, 1)), include_self=False)
    with pytest.raises(Exception, match=r"shape|type"):
        rewards.mean_win_rates(jnp.zeros((1, 2, 3)))


def test_both_orders_are_asked():
    calls = []

    def prefer(prompts, first, second, *, answer, first_truncated, second_truncated):
        calls.append((prompts, first, second, answer, first_truncated, second_truncated))
        return [0.9, 0.6, 0.8] if len(calls) == 1 else [0.3, 0.2, 0.8]

    rows = (["p", "q", "r"], ["a", "b", "same"], ["c", "d", "same"])
    sides = {"truncated": ([1, 2, 3], [4, 5, 6])}
    found = rewards.compare(prefer, *rows, {"answer": [7, 8, 9]}, sides)
    np.testing.assert_allclose(found, [(0.9 + 0.7) / 2, (0.6 + 0.8) / 2, 0.5], rtol=1e-6)  # identical: no preference
    assert found.dtype == np.float32
    assert calls == [
        (*rows, [7, 8, 9], [1, 2, 3], [4, 5, 6]),
        (rows[0], rows[2], rows[1], [7, 8, 9], [4, 5, 6], [1, 2, 3]),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.01, -0.01, None, "1"])
def test_a_preference_that_is_no_probability_names_its_row(bad):
    message = r"preference <lambda> returned .* for row 1, prompt 'q', completions 'b' and 'd'; expected a probability"
    with pytest.raises(ValueError, match=message):
        rewards.compare(lambda p, a, b: [0.5, bad], ["p", "q"], ["a", "b"], ["c", "d"])


def test_wrong_counts_are_refused():
    def prefer(prompts, first, second, **_):
        return [0.5]

    with pytest.raises(ValueError, match="preference prefer returned 1 numbers for 2 pairs"):
        rewards.compare(prefer, ["p", "q"], ["a", "b"], ["c", "d"])
    with pytest.raises(ValueError, match="1 prompts, but 2 values of 'second'"):
        rewards.compare(prefer, ["p"], ["a"], ["c", "d"])
    with pytest.raises(ValueError, match="1 prompts, but 2 values of 'answer'"):
        rewards.compare(prefer, ["p"], ["a"], ["c"], {"answer": [1, 2]})
    with pytest.raises(ValueError, match="1 prompts, but 2 values of 'second_truncated'"):
        rewards.compare(prefer, ["p"], ["a"], ["c"], sides={"truncated": ([1], [1, 2])})
    with pytest.raises(ValueError, match="a column is named 'first', which is an argument"):
        rewards.compare(prefer, ["p"], ["a"], ["c"], {"first": [1]})


def test_a_shift_is_one_of_scores():
    scores = np.array([[0.4, -1.0]])
    before = np.asarray(rewards.preference_matrix(jnp.asarray(scores)))
    after = np.asarray(rewards.preference_matrix(jnp.asarray(scores - np.array([[1.0, 0.0]]))))
    shift = np.array([[[0.0, -1.0], [1.0, 0.0]]])
    np.testing.assert_allclose(rewards.shift_preference(before, shift), after, rtol=1e-5)
    certain = rewards.shift_preference(np.array([1.0, 0.0, 0.5, 1.0]), np.array([0.0, 0.0, 0.0, -1.0]))
    np.testing.assert_array_equal(certain[:3], [1.0, 0.0, 0.5])
    assert 0.99 < certain[3] < 1
