"""What is particular to losses of reward models: outside vectors, closed forms, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, by_position, probability, real, tokenwise
from references import reward as references

from alignax import losses, reduce

SCORE = Input("B", mask=None, differentiable=True, make=real)
SCORES = {"chosen": SCORE, "rejected": SCORE}
PMP = {"good": SCORE, "bad": SCORE, "good_nll": SCORE}


def test_a_tie_costs_log_2_and_pulls_the_scores_together():
    chosen, rejected = jnp.array([2.0, 0.5, -1.0]), jnp.array([1.0, 0.5, 1.0])
    loss, gradient = jax.vjp(lambda x: losses.bradley_terry(x, rejected, preference=0.5), chosen)
    np.testing.assert_allclose(loss[1], math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(np.sign(gradient(jnp.ones(3))[0]), [1, 0, -1])


def test_a_constant_on_both_sides_matters_to_centering_only():
    chosen, rejected = jnp.array([1.5, -2.0]), jnp.array([0.5, 1.0])
    shifted = losses.bradley_terry(chosen + 8, rejected + 8)
    np.testing.assert_array_equal(shifted, losses.bradley_terry(chosen, rejected))
    np.testing.assert_allclose(losses.reward_centering(chosen + 8, rejected + 8), [18.0**2, 15.0**2])


def test_far_scores_neither_overflow_nor_lose_their_gradient():
    chosen, rejected = jnp.array([-1e4, 1e4]), jnp.array([1e4, -1e4])
    loss, gradient = jax.vjp(lambda x: losses.bradley_terry(x, rejected), chosen)
    np.testing.assert_array_equal(loss, [2e4, 0.0])
    np.testing.assert_array_equal(gradient(jnp.ones(2))[0], [-1.0, 0.0])


def test_shapes_of_margin_and_preference_are_refused():
    x = jnp.zeros(3)
    for name in ("margin", "preference"):
        with pytest.raises(ValueError, match=rf"{name} of shape \(2,\); expected a number or \(3,\)"):
            losses.bradley_terry(x, x, **{name: jnp.zeros(2)})


@pytest.mark.parametrize("preference", [1.2, -0.1, float("nan"), jnp.array([0.5, 2.0, 1.0])])
def test_a_preference_that_is_no_probability_is_refused(preference):
    with pytest.raises(ValueError, match=r"bradley_terry: preference=.*; expected 0 <= preference <= 1"):
        losses.bradley_terry(jnp.zeros(3), jnp.zeros(3), preference=preference)


def test_a_rating_far_off_pulls_no_harder_than_delta():
    target = jnp.array([0.0, 0.0, 0.0])
    slope = jax.grad(lambda x: jnp.sum(losses.reward_huber(x, target, delta=0.5)))(jnp.array([0.2, 3.0, -100.0]))
    np.testing.assert_allclose(slope, [0.2, 0.5, -0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="reward_huber: delta=0; expected 0 < delta < inf"):
        losses.reward_huber(target, target, delta=0.0)


def test_attributes_that_nobody_rated_count_nowhere():
    scores, targets = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0, jnp.nan], [jnp.nan, 2.0]])
    mask = jnp.array([[1, 0], [0, 1]])
    loss = losses.reward_mse(scores, targets, mask)
    np.testing.assert_array_equal(loss, [[1.0, 0.0], [0.0, 4.0]])
    np.testing.assert_allclose(reduce.token_mean(loss, mask).value(), 2.5)


def test_a_binary_reward_is_pulled_towards_its_probability():
    scores, targets = jnp.array([0.0, 2.0, -1.0]), jnp.array([1.0, 0.25, 0.5])
    slope = jax.grad(lambda x: jnp.sum(losses.reward_binary(x, targets)))(scores)
    np.testing.assert_allclose(slope, jax.nn.sigmoid(scores) - targets, rtol=1e-6)
    with pytest.raises(ValueError, match="reward_binary: targets=3; expected 0 <= targets <= 1"):
        losses.reward_binary(scores, 3 * targets)


def test_margin_and_preference_are_constants():
    def total(margin, preference):
        return losses.bradley_terry(jnp.ones(1), jnp.zeros(1), margin=margin, preference=preference)[0]

    assert jax.grad(total, (0, 1))(0.5, 0.75) == (0, 0)


@pytest.mark.parametrize("loss", [losses.reward_mse, losses.reward_huber, losses.reward_binary])
def test_ratings_are_constants(loss):
    slope = jax.grad(lambda x: jnp.sum(loss(jnp.array([0.5]), x)))(jnp.array([0.25]))
    np.testing.assert_array_equal(slope, [0.0])


def rated(loss, name, mask=False, targets=real, **more):
    """The row of a loss of ratings, alone or in several attributes."""
    axes, under = ("B T", "mask") if mask else ("B", None)
    inputs = {"scores": Input(axes, under, True, real), "targets": Input(axes, under, make=targets)}
    call = tokenwise(loss, *inputs) if mask else by_position(loss, *inputs)
    return Row(loss, call, getattr(references, name), inputs, **more)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "bradley_terry": Row(
            losses.bradley_terry,
            by_position(losses.bradley_terry, *SCORES),
            references.bradley_terry,
            SCORES,
            {"margin": 0.5, "preference": 0.8},
        ),
        "bradley_terry_arrays": Row(
            losses.bradley_terry,
            by_position(losses.bradley_terry, *SCORES, margin="margin", preference="preference"),
            references.bradley_terry,
            SCORES | {"margin": Input("B", None, make=real), "preference": Input("B", None, make=probability)},
        ),
        "reward_centering": Row(
            losses.reward_centering,
            by_position(losses.reward_centering, *SCORES),
            references.reward_centering,
            SCORES,
        ),
        "pmp": Row(
            losses.pmp,
            by_position(losses.pmp, *PMP),
            references.pmp,
            PMP,
            {"mu": 0.3},
        ),
        "reward_mse": rated(losses.reward_mse, "reward_mse"),
        "reward_mse_of_attributes": rated(losses.reward_mse, "reward_mse", mask=True),
        "reward_huber": rated(losses.reward_huber, "reward_huber", hyper={"delta": 0.7}),
        "reward_huber_of_attributes": rated(losses.reward_huber, "reward_huber", mask=True),
        "reward_binary": rated(losses.reward_binary, "reward_binary", targets=probability),
        "reward_binary_of_attributes": rated(losses.reward_binary, "reward_binary", mask=True, targets=probability),
    }
