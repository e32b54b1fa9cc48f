"""What is particular to beta-DPO: statistics of a batch, a draw, a beta without gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, pairwise, probability, real
from references import dynamic_beta as references
from vectors.common import response

from alignax import losses
from alignax.losses.dynamic_beta import log_weight

GAPS = jnp.array([0.5, 3.0, -2.0, 0.0, 1.0, 9.0, -0.5, 0.2, 0.7, 1.4])
CHOSEN, REJECTED = response([-6.0, -3.0], [-7.0, -4.5]), response([-8.0, -9.0], [-7.5, -9.0])


def test_beta_follows_the_gap_and_has_no_gradient():
    def loss(mean, **hyper):
        return losses.beta_dpo(CHOSEN, REJECTED, gap_mean=0.5, selected_mean=mean, **hyper)

    np.testing.assert_allclose(loss(0.5), losses.dpo(CHOSEN, REJECTED), rtol=1e-6)
    np.testing.assert_allclose(loss(1.5), losses.dpo(CHOSEN, REJECTED, beta=0.16), rtol=1e-6)
    np.testing.assert_allclose(loss(1.5, alpha=0.0), losses.dpo(CHOSEN, REJECTED), rtol=1e-6)
    np.testing.assert_allclose(loss(-30.0), losses.dpo(CHOSEN, REJECTED, beta=1e-3), rtol=1e-6)
    assert jax.grad(lambda mean: loss(mean).sum())(1.5) == 0
    with pytest.raises(AssertionError, match="rank"):
        loss(jnp.array([0.5, 0.5]))
    with pytest.raises(ValueError, match="beta_dpo: beta=0; expected beta > 0"):
        loss(0.5, beta=0.0)


def test_moments_move_and_stay():
    @jax.jit
    def run():
        of = losses.beta_dpo_moments
        filled = of(0.0, 0.0, jnp.array([1.0, 3.0, jnp.nan]), jnp.array([1.0, 1.0, 0.0]))
        return filled, of(1.0, 2.0, GAPS, jnp.zeros(10)), of(1.0, 2.0, GAPS[:1]), of(0.0, 0.0, GAPS, momentum=0.0)

    filled, of_none, of_one, first = run()
    np.testing.assert_allclose(filled, [0.2, 0.1 * np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(of_none, [1.0, 2.0], rtol=1e-7)
    np.testing.assert_allclose(of_one, [0.95, 1.8], rtol=1e-6)
    np.testing.assert_allclose(first, [np.mean(GAPS), np.std(GAPS, ddof=1)], rtol=1e-6)


def select(seed=0, weights=None, mean=0.5, std=1.0, **options):
    key = jax.random.key(seed)
    return np.asarray(losses.beta_dpo_select(key, GAPS, weights, mean=mean, std=std, **options))


@pytest.mark.parametrize("ratio, kept", [(0.0, 10), (0.2, 8), (0.25, 7), (0.9, 1), (0.95, 0)])
def test_how_many_are_selected(ratio, kept):
    np.testing.assert_array_equal(select(ratio=ratio).sum(), kept)


def test_fillers_are_neither_counted_nor_selected_and_weights_come_through():
    weights = np.array([2.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0], np.float32)
    for seed in range(5):
        chosen = select(seed, jnp.asarray(weights), ratio=0.5)
        assert (chosen > 0).sum() == 3
        np.testing.assert_array_equal(chosen[chosen > 0], weights[chosen > 0])
    np.testing.assert_array_equal(select(weights=jnp.asarray(weights), ratio=0.0), weights)


def test_the_draw_has_the_weights_it_should():
    """One of ten: the probabilities of a softmax; and a std of 0 leaves a number, the nearest gap wins."""
    keys = jax.random.split(jax.random.key(1), 4000)
    draw = functools.partial(losses.beta_dpo_select, gaps=GAPS, mean=0.5, std=1.5, ratio=0.9)
    share = jax.jit(lambda keys: jnp.mean(jax.vmap(lambda key: draw(key))(keys), axis=0))(keys)
    weight = np.exp(-0.5 * ((np.asarray(GAPS) - 0.5) / 1.5) ** 2)
    np.testing.assert_allclose(share, weight / weight.sum(), atol=0.03)
    np.testing.assert_array_equal(select(std=0.0, ratio=0.9), np.eye(10)[0])


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_a_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"beta_dpo_moments: momentum=.*expected 0 <= momentum < 1"):
        losses.beta_dpo_moments(0.0, 0.0, jnp.zeros(2), momentum=momentum)


@pytest.mark.parametrize("ratio", [-0.1, 1.0])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=r"beta_dpo_select: ratio=.*expected 0 <= ratio < 1"):
        select(ratio=ratio)


def test_statistics_have_no_gradient():
    def total(gaps):
        mean, std = losses.beta_dpo_moments(0.0, 0.0, gaps)
        return mean + std + losses.beta_dpo_select(jax.random.key(0), gaps, mean=mean, std=std).sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(GAPS), 0.0)
    np.testing.assert_allclose(log_weight(jnp.array([3.0]), 1.0, 0.5), [-8.0])


def moments(x, mean=0.0, std=0.0, momentum=0.9):
    return jnp.stack(losses.beta_dpo_moments(mean, std, x["gaps"], x["weights"], momentum=momentum))


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "beta_dpo": Row(
            losses.beta_dpo,
            pairwise(functools.partial(losses.beta_dpo, gap_mean=0.4, selected_mean=0.7)),
            references.beta_dpo,
            PAIR,
            {"beta": 0.3, "alpha": 0.8, "gap_mean": 1.0, "selected_mean": 0.5},
        ),
        "beta_dpo_moments": Row(
            losses.beta_dpo_moments,
            moments,
            references.beta_dpo_moments,
            {"gaps": Input("B", None, make=real), "weights": Input("B", None, make=probability)},
            {"mean": 0.5, "std": 2.0, "momentum": 0.7},
            coupled=True,
        ),
    }
