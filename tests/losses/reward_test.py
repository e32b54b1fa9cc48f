"""What is particular to losses of reward models: outside vectors, closed forms, refusals."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, by_position, real
from references import reward as references

from alignax import losses

SCORE = Input("B", mask=None, differentiable=True, make=real)
SCORES = {"chosen": SCORE, "rejected": SCORE}


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


def test_vectors(shared):
    used = set()
    for vector in json.loads((shared / "spec" / "vectors_preference.json").read_text()):
        if not vector["id"].startswith("bt_"):
            continue
        x, hyper, expected = vector["inputs"], vector["hyperparameters"], vector["expected"]
        chosen, rejected = (jnp.array(x[f"{side}_rewards"]) for side in ("chosen", "rejected"))
        loss = losses.bradley_terry(
            chosen,
            rejected,
            margin=jnp.array(x.get("margin", 0.0)),
            preference=jnp.array(x.get("prob_chosen", 1 - hyper.get("label_smoothing", 0.0))),
        )
        centred = loss + hyper.get("center_coef", 0.0) * losses.reward_centering(chosen, rejected)
        np.testing.assert_allclose(jnp.mean(centred), expected["loss"], rtol=1e-6, err_msg=vector["id"])
        if "per_example" in expected:
            np.testing.assert_allclose(loss, expected["per_example"], rtol=1e-6, err_msg=vector["id"])
        used.add(vector["id"])
    assert used == {"bt_basic", "bt_margin_small", "bt_centering", "bt_soft_label", "bt_label_smoothing"}


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
            SCORES | {"margin": SCORE, "preference": SCORE},
        ),
        "reward_centering": Row(
            losses.reward_centering,
            by_position(losses.reward_centering, *SCORES),
            references.reward_centering,
            SCORES,
        ),
    }
