"""Selection of samples: closed forms, enumeration, missing rewards, refusals."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from alignax import reduce
from alignax.data import selection

NAN = math.nan


def test_best_of_n():
    rewards = [[0.2, 0.9, 0.9], [NAN, -2.0, -1.0], [NAN, NAN, NAN], [-math.inf, NAN, -5.0], [NAN, -math.inf, NAN]]
    np.testing.assert_array_equal(selection.best_of_n(rewards), [1, 2, -1, 2, 1])
    assert selection.best_of_n([3.0, 4.0]) == 1


def test_best_of_n_kl_is_that_of_the_largest_of_n_uniform_numbers():
    # density n u^(n - 1) on [0, 1]: KL = integral of it times its log
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (1, 2, 16):
        log_density = math.log(n) + (n - 1) * np.log(u)
        np.testing.assert_allclose(selection.best_of_n_kl(n), np.mean(np.exp(log_density) * log_density), atol=1e-4)
    with pytest.raises(ValueError, match=r"n=0\.0; expected 1 or more"):
        selection.best_of_n_kl(0)


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_best_of_n_expected_is_the_mean_over_all_choices(n):
    rewards = np.random.default_rng(0).normal(size=(2, 6))
    expected = [np.mean([max(chosen) for chosen in itertools.combinations(row, n)]) for row in rewards]
    np.testing.assert_allclose(selection.best_of_n_expected(rewards, n), expected, rtol=1e-12)


def test_best_of_n_expected_of_many_samples():
    uniform = np.arange(1, 5001) / 5001  # the largest of n uniform numbers is n / (n + 1) on average
    np.testing.assert_allclose(selection.best_of_n_expected(uniform, 1000), 1000 / 1001, rtol=1e-9)
    for n, rewards, message in ((3, [1.0, 2.0], "n=3 of 2 samples; expected 1 to 2"), (1, [1.0, NAN], "NaN")):
        with pytest.raises(ValueError, match=message):
            selection.best_of_n_expected(rewards, n)


def test_top_k_over_n():
    found = selection.top_k_over_n([[1.0, 3.0, NAN, 3.0], [NAN, NAN, 0.0, NAN]], 2)
    np.testing.assert_array_equal(found, [[1, 3], [2, -1]])
    with pytest.raises(ValueError, match="k=5 of 4 samples; expected 1 to 4"):
        selection.top_k_over_n(np.ones((2, 4)), 5)


def test_reward_weights():
    weights = selection.reward_weights([[1.0, NAN, 1.0 + math.log(3.0)], [1e9, 0.0, -1e9], [NAN] * 3], beta=1.0)
    np.testing.assert_allclose(weights, [[0.25, 0, 0.75], [1, 0, 0], [0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(selection.reward_weights([0.0, 1.0], beta=1e9), [0.5, 0.5], atol=1e-8)


@pytest.mark.parametrize("function", [selection.reward_weights, selection.rso_accept_probability])
def test_a_temperature_of_0_is_refused(function):
    for beta in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match=rf"{function.__name__}: beta=.*; expected a number above 0"):
            function([1.0, 2.0], beta=beta)


def test_rso_limits():
    draw = np.random.default_rng(0).random
    rewards = [0.3, NAN, 1.0, -2.0, 0.9]
    np.testing.assert_array_equal(selection.rso_sample(rewards, draw, count=2, beta=1e-6), [2, 4])  # top k over n
    np.testing.assert_array_equal(selection.rso_sample(rewards, draw, count=3, beta=1e9), [0, 2, 3])  # all, in order
    assert sorted(selection.rso_sample(rewards, draw, count=8)) == [0, 2, 3, 4]  # fewer than asked for
    assert selection.rso_sample([NAN, NAN], draw).size == 0
    with pytest.raises(ValueError, match=r"shape \(1, 2\), count=8; expected \[N\]"):
        selection.rso_sample([[1.0, 2.0]], draw)


def test_rso_accepts_in_proportion_to_the_tilted_policy():
    """One accepted of many proposals, drawn from p: the accepted are p exp(r / beta), up to the finite number."""
    rng = np.random.default_rng(0)
    p, reward = np.array([0.5, 0.3, 0.2]), np.array([0.0, 0.5, 1.0])
    counts = np.zeros(3)
    for _ in range(300):
        proposals = rng.choice(3, size=24, p=p)
        accepted = selection.rso_sample(reward[proposals], rng.random, count=3, beta=0.7)
        counts += np.bincount(proposals[accepted], minlength=3)
    expected = p * np.exp(reward / 0.7)
    np.testing.assert_allclose(counts / counts.sum(), expected / expected.sum(), atol=0.05)


def test_rest_filter_is_strict():
    np.testing.assert_array_equal(selection.rest_filter([[0.7, 0.71, NAN]], 0.7), [[False, True, False]])


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_tournament_of_a_consistent_judge(count):
    strength = np.random.default_rng(count).permutation(count)
    asked = []

    def prefer(i, j):
        asked.append((i, j))
        return 1.0 if strength[i] > strength[j] else 0.0

    order = np.random.default_rng(0).permutation(count)
    found = selection.tournament(prefer, count, order=order)
    assert found.winner == np.argmax(strength) and found.pairs.shape == (count - 1, 2) == (len(asked), 2)
    assert all(strength[winner] > strength[loser] for winner, loser in found.pairs)
    assert sum(map(len, found.rounds)) == count - 1 and asked == [pair for met in found.rounds for pair in met]


@pytest.mark.parametrize("chance", [NAN, 1.5, -0.1])
def test_tournament_of_a_judge_who_says_no_probability(chance):
    with pytest.raises(ValueError, match=r"prefer\(0, 1\) is .*; expected a probability"):
        selection.tournament(lambda i, j: chance, 2)


def test_tournament_of_a_judge_who_cannot_tell():
    found = selection.tournament(lambda i, j: 0.5 + 1e-9, 3, order=[2, 1, 0])
    assert found.winner == 0 and found.pairs.tolist() == [[1, 2], [0, 1]] and found.rounds == [[(2, 1)], [(1, 0)]]


@pytest.mark.parametrize("count, order", [(0, None), (2, [0, 0]), (2, [0, 1, 2])])
def test_tournament_refuses(count, order):
    with pytest.raises(ValueError, match="expected at least one answer and a permutation"):
        selection.tournament(lambda i, j: 1.0, count, order=order)


def test_hybrid_weights():
    x, online = np.array([1.0, 2.0, 5.0, 3.0, 7.0], np.float32), np.array([True, False, True, False, False])
    weights = selection.hybrid_weights(online, fraction=0.3)
    mean = reduce.batch_mean(jnp.asarray(x), jnp.asarray(weights)).value()
    np.testing.assert_allclose(mean, 0.3 * 3.0 + 0.7 * 4.0, rtol=1e-6)
    np.testing.assert_allclose(weights.sum(), 5.0, rtol=1e-6)
    for one_side in (np.zeros(3), np.ones(3)):
        np.testing.assert_array_equal(selection.hybrid_weights(one_side, fraction=0.0), np.ones(3))
    np.testing.assert_array_equal(selection.hybrid_weights([1, 0], fraction=1.0), [2, 0])
    for bad in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"expected \[B\], 0 <= fraction <= 1"):
            selection.hybrid_weights(online, fraction=bad)
