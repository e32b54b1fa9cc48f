"""Filters against loops over a sorted vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax.sampling import transforms

INF = np.inf


def kept_by_sorting(logits, temperature, top_k, top_p, min_p):
    """The tokens of one row that stay, from the definitions: sort, count, accumulate, with ties kept together."""
    z = np.asarray(logits, np.float64) / temperature
    p = np.exp(z - z.max())
    order = np.argsort(-z, kind="stable")
    kept = np.ones(len(z), bool)
    if 0 < top_k < len(z):
        kept &= z >= z[order[top_k - 1]]
    if top_p < 1:
        mass, total, worst = 0.0, p[kept].sum(), None
        for token in (token for token in order if kept[token]):
            if mass >= top_p * total:
                break
            mass, worst = mass + p[token], z[token]
        kept &= z >= worst
    return kept & (p >= min_p)


@jax.jit
def filtered(logits, temperature, top_k, top_p, min_p):
    gap = transforms.gaps(logits, temperature)
    return gap, transforms.gap_limit(gap, top_k=top_k, top_p=top_p, min_p=min_p)


def kept(logits, *setting):
    dtypes = np.float32, np.int32, np.float32, np.float32
    gap, limit = filtered(logits, *(np.full(len(logits), value, dtype) for value, dtype in zip(setting, dtypes)))
    return np.asarray(gap) <= np.asarray(limit)[:, None]


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 7, 1.0, 0.0),
    (1.0, 300, 1.0, 0.0),
    (1.0, 10**6, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 0, 0.3, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 0.999, 0.0),
    (1.0, 0, 1.0, 0.07),
    (1.0, 0, 1.0, 1.0),
    (0.8, 40, 0.85, 0.02),
    (0.8, 5, 0.55, 0.2),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_keeps_what_sorting_keeps(setting, scale):
    logits = np.random.default_rng(0).normal(size=(9, 301)).astype(np.float32) * scale
    expected = np.stack([kept_by_sorting(row, *setting) for row in logits])
    np.testing.assert_array_equal(kept(logits, *setting), expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_ties_stand_or_fall_together(setting):
    logits = np.random.default_rng(1).integers(-6, 4, size=(9, 300)).astype(np.float32)
    expected = np.stack([kept_by_sorting(row, *setting) for row in logits])
    result = kept(logits, *setting)
    np.testing.assert_array_equal(result, expected)
    for row, mask in zip(logits, result):
        assert all(len(set(mask[row == value])) == 1 for value in set(row))


def test_closed_form():
    # p = .5 .25 .125 .125: the nucleus of .6 holds two, of .75 exactly two, of .76 four (a tie)
    logits = np.log(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32))
    assert kept(logits, 1.0, 0, 0.6, 0.0).tolist() == [[False, True, False, True]]
    assert kept(logits, 1.0, 0, 0.74999, 0.0).tolist() == [[False, True, False, True]]
    assert kept(logits, 1.0, 0, 0.76, 0.0).tolist() == [[True, True, True, True]]
    assert kept(logits, 1.0, 0, 0.5001, 0.0).tolist() == [[False, True, False, True]]
    # of the two that top-k leaves the first holds 2/3
    assert kept(logits, 1.0, 2, 0.66, 0.0).tolist() == [[False, True, False, False]]
    assert kept(logits, 1.0, 2, 0.67, 0.0).tolist() == [[False, True, False, True]]
    assert kept(logits, 1.0, 0, 1.0, 0.49).tolist() == [[False, True, False, True]]
    assert kept(logits, 1.0, 0, 1.0, 0.51).tolist() == [[False, True, False, False]]


def test_every_row_has_its_own_setting():
    logits = np.random.default_rng(2).normal(size=(4, 50)).astype(np.float32)
    settings = [(1.0, 0, 1.0, 0.0), (0.5, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0), (2.0, 20, 0.9, 0.3)]
    gap, limit = map(np.asarray, filtered(logits, *(jnp.asarray(x) for x in zip(*settings))))
    expected = [kept_by_sorting(row, *setting) for row, setting in zip(logits, settings)]
    np.testing.assert_array_equal(gap <= limit[:, None], expected)
    assert limit[0] == INF


def test_tokens_that_are_one_bit_apart_are_told_apart():
    gaps = np.append(0, np.float32(1) + np.arange(16, dtype=np.float32) * np.float32(2.0**-23)).astype(np.float32)
    logits = -np.random.default_rng(3).permutation(gaps)[None]
    for k in range(1, 17):
        np.testing.assert_array_equal(kept(logits, 1.0, k, 1.0, 0.0)[0], -logits[0] <= gaps[k - 1])


def test_minus_infinity_is_never_wanted_and_never_hurts():
    logits = np.array([[-INF, 1.0, -INF, 0.0, -1.0]], np.float32)
    assert kept(logits, 1.0, 2, 1.0, 0.0).tolist() == [[False, True, False, True, False]]
    assert kept(logits, 1.0, 0, 0.99, 0.0).tolist() == [[False, True, False, True, True]]
    assert kept(logits, 1.0, 4, 1.0, 1e-6).tolist() == [[False, True, False, True, True]]


def test_a_tiny_temperature_is_no_nan():
    gap = transforms.gaps(jnp.array([[3e38, 1.0, -3e38]]), jnp.array([1e-30]))
    assert gap.tolist() == [[0.0, INF, INF]]


def test_nothing_is_searched_when_no_filter_is_on():
    arguments = jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), jnp.ones(2), jnp.zeros(2)

    def limit(gap, k, p, m):
        return transforms.gap_limit(gap, top_k=k, top_p=p, min_p=m)

    jaxpr = jax.make_jaxpr(limit)(*arguments).jaxpr
    names = [equation.primitive.name for equation in jaxpr.eqns]
    assert names.count("cond") == 2
    assert "while" not in names and "scan" not in names  # the searches lie inside the branches
    assert "sort" not in str(jaxpr) and "top_k" not in names


def test_a_penalty_is_for_what_a_row_holds():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(5, 6)).astype(np.float32)
    logits[0, 2], logits[1, 3] = 0, -INF
    tokens, columns = rng.integers(0, 6, (5, 4)), np.array([0, 1, 2, 3, 4])
    tokens[1, 0], tokens[3, 1] = 3, 99  # a token that is out already, and one outside of the vocabulary
    tokens = np.where(np.arange(4)[None] < columns[:, None], tokens, 0)  # what is not filled is no token 0
    penalty = np.array([3.0, 2.0, 1.0, 0.5, 1.7], np.float32)
    expected = logits.astype(np.float64)
    for row, (filled, factor) in enumerate(zip(columns, penalty)):
        for token in set(tokens[row, :filled]) - {99}:
            expected[row, token] *= factor if expected[row, token] < 0 else 1 / factor
    found = transforms.penalise(*map(jnp.asarray, (logits, tokens, columns, penalty)))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(found[0], logits[0])
    np.testing.assert_array_equal(found[2], logits[2])


def test_a_penalty_is_looked_up_only_where_there_is_one():
    arguments = jnp.zeros((2, 8)), jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32), jnp.ones(2)
    names = [equation.primitive.name for equation in jax.make_jaxpr(transforms.penalise)(*arguments).jaxpr.eqns]
    assert names.count("cond") == 1 and "scatter" not in names


def test_forbidden_tokens_of_each_row():
    logits = jnp.arange(12.0).reshape(3, 4)
    found = transforms.forbid(logits, jnp.array([[-1, -1], [2, 0], [3, 99]]))
    assert found.tolist() == [[0, 1, 2, 3], [-INF, 5, -INF, 7], [8, 9, 10, -INF]]
    assert transforms.forbid(logits, jnp.zeros((3, 0), jnp.int32)) is logits
