"""Selection of pairs: by hand, missing rewards, counts, what a seed repeats, refusals."""

import math

import numpy as np
import pytest

from alignax.data import pairing

NAN = math.nan
REWARDS = [[0.2, 0.9, 0.5, 0.1], [0.4, 0.4, 0.4, 0.4], [1.0, NAN, 0.8, 0.3], [NAN, NAN, NAN, 1.0], [2.0, 2.0, 1.0, 1.0]]
LENGTHS = [[1, 1, 1, 1], [9, 1, 1, 1], [0, 1, 100, 0], [1, 1, 1, 1], [0, 3, 0, 3]]


def indices(pairs):
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist()))


NONE = (-1, -1)
CASES = {
    "max_min": (pairing.max_min, {}, [(1, 3), NONE, (0, 3), NONE, (0, 2)]),
    "max_max": (pairing.max_max, {}, [(1, 2), NONE, (0, 2), NONE, NONE]),
    "max_random": (pairing.max_random, {}, [(1, 0), NONE, (0, 2), NONE, NONE]),
    "random_pair": (pairing.random_pair, {}, [(1, 0), NONE, (0, 2), NONE, NONE]),
    "max_min_penalised": (
        pairing.max_min_penalised,
        {"lengths": LENGTHS, "length_penalty": 0.5},
        [(1, 3), NONE, (0, 2), NONE, (0, 3)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    function, options, expected = CASES[name]
    pairs = function(REWARDS, **options)
    assert indices(pairs) == expected
    assert pairs.dropped == expected.count(NONE) and pairs.kept.tolist() == [pair != NONE for pair in expected]
    gaps = [0 if (c, r) == NONE else REWARDS[p][c] - REWARDS[p][r] for p, (c, r) in enumerate(expected)]
    np.testing.assert_allclose(pairs.margin, gaps)


@pytest.mark.parametrize("name", CASES)
def test_bad_rewards_are_refused(name):
    function, options, _ = CASES[name]
    for bad in ([1.0, 2.0], [[1.0], [2.0]]):
        with pytest.raises(ValueError, match=rf"{name}: rewards of shape .*at least 2 samples"):
            function(bad, **options)


def test_penalised_pairs_are_ordered_by_the_raw_reward():
    pairs = pairing.max_min_penalised([[1.0, 0.3, 0.8, 0.3]], [[300, 100, 90, 100]], length_penalty=0.001)
    assert indices(pairs) == [(2, 1)]
    far = pairing.max_min_penalised([[1.0, 0.3]], [[300, 0]], length_penalty=1.0)  # the penalty turns them round
    assert indices(far) == [(0, 1)]
    with pytest.raises(ValueError, match=r"lengths \(1, 3\) beside rewards \(1, 2\)"):
        pairing.max_min_penalised([[1.0, 0.3]], [[1, 2, 3]], length_penalty=1.0)


@pytest.mark.parametrize("function", [pairing.max_random, pairing.random_pair])
def test_random_pairs_repeat_with_their_seed_and_reach_every_pair(function):
    rewards = np.tile([[3.0, 1.0, NAN, 2.0]], (200, 1))
    once, again, other = (function(rewards, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once.rejected, again.rejected)
    assert np.any(once.rejected != other.rejected)
    every = {(0, 1), (0, 3)} | ({(3, 1)} if function is pairing.random_pair else set())
    assert set(indices(once)) == every
    assert min(indices(once).count(pair) for pair in every) > 200 / len(every) / 2


def test_rs_dpo_pairs():
    rewards = [0.0, 2.0, NAN, 1.0, 1.0]
    found = pairing.rs_dpo_pairs(rewards, threshold=0.7)  # log(0.7 / 0.3) = 0.85
    assert found.tolist() == [[1, 0], [1, 3], [1, 4], [3, 0], [4, 0]]
    assert pairing.rs_dpo_pairs(rewards, threshold=0.7, temperature=2.0).tolist() == [[1, 0]]
    assert pairing.rs_dpo_pairs(rewards, threshold=0.7, most=2).tolist() == [[1, 0], [1, 3]]
    assert pairing.rs_dpo_pairs([1.0, 1.0], threshold=0.5).shape == (0, 2)
    for bad in ({"threshold": 0.4}, {"threshold": 1.0}, {"threshold": 0.7, "temperature": 0.0}):
        with pytest.raises(ValueError, match=r"expected \[N\], 0.5 <= threshold < 1 and a temperature above 0"):
            pairing.rs_dpo_pairs(rewards, **bad)
