"""Pairwise preference models: order, several aspects, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, boolean, by_position, probability, real
from references import preference_model as references

from alignax import losses

SCORE = Input("B", mask=None, differentiable=True, make=real)
SIDES = {"left": SCORE, "right": SCORE}
ASPECTS = {name: Input("B K", mask=None, differentiable=True, make=real) for name in SIDES}
ORDERS = {"logit": SCORE, "swapped_logit": SCORE}


def test_swapping_the_answers_and_the_preference_changes_nothing():
    left, right = jnp.array([0.3, -2.0, 5.0]), jnp.array([1.0, 0.5, -3.0])
    p = jnp.array([1.0, 0.2, 0.5])
    np.testing.assert_allclose(
        losses.preference_model(left, right, p), losses.preference_model(right, left, 1 - p), rtol=1e-6
    )
    np.testing.assert_allclose(
        losses.symmetric_preference_model(left, right, p),
        losses.symmetric_preference_model(right, left, 1 - p),
        rtol=1e-6,
    )


def test_an_order_that_decides_by_itself_costs_more_than_saying_nothing():
    bias = jnp.array([2.0])  # the first one wins, whichever it is
    biased = losses.symmetric_preference_model(bias, bias, jnp.array([1.0]))
    fair = losses.symmetric_preference_model(0 * bias, 0 * bias, jnp.array([1.0]))
    np.testing.assert_allclose(fair, np.log(2), rtol=1e-6)
    assert biased > fair


def test_of_a_consistent_model_both_orders_cost_the_same():
    logit, p = jnp.array([1.5, -0.4]), jnp.array([True, False])
    one = losses.preference_model(logit, jnp.zeros(2), p)
    np.testing.assert_allclose(losses.symmetric_preference_model(logit, -logit, p), one, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.preference_model, losses.symmetric_preference_model])
def test_preferences_are_constants_and_probabilities(loss):
    x = jnp.array([0.5, -1.0])
    slope = jax.grad(lambda p: jnp.sum(loss(x, 2 * x, p)))(jnp.array([0.5, 0.9]))
    np.testing.assert_array_equal(slope, [0.0, 0.0])
    with pytest.raises(ValueError, match=rf"{loss.__name__}: preference=-1; expected 0 <= preference <= 1"):
        loss(x, x, jnp.array([1.0, -1.0]))  # PairRM's own labels are signs


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "preference_model": Row(
            losses.preference_model,
            by_position(losses.preference_model, *SIDES, "preference"),
            references.preference_model,
            SIDES | {"preference": Input("B", mask=None, make=boolean)},
        ),
        "preference_model_of_aspects": Row(
            losses.preference_model,
            by_position(losses.preference_model, *ASPECTS, "preference"),
            references.preference_model,
            ASPECTS | {"preference": Input("B K", mask=None, make=probability)},
        ),
        "symmetric_preference_model": Row(
            losses.symmetric_preference_model,
            by_position(losses.symmetric_preference_model, *ORDERS, "preference"),
            references.symmetric_preference_model,
            ORDERS | {"preference": Input("B", mask=None, make=probability)},
        ),
    }
