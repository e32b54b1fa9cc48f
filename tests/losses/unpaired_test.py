"""What is particular to losses of single answers: the numbers of a batch, one class alone, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import CONSTANT, LOGP, Input, Properties, Row, boolean, make, probability
from references import unpaired as references

from alignax import losses
from alignax.types import Mean, Response

ANSWERS = {"logp": LOGP, "ref_logp": CONSTANT, "desirable": Input("B", mask=None, make=boolean)}
WEIGHT = {"weight": Input("B", mask=None, make=probability)}


def answers(x):
    return Response(x["logp"], x["ref_logp"], x["mask"])


def kto(x, kl=0.3, **hyper):
    return losses.kto(answers(x), x["desirable"], kl, **hyper)


def bco(x, delta=0.3, **hyper):
    return losses.bco(answers(x), x["desirable"], delta, **hyper)


def batch(seed=0):
    """Ragged answers, one of them empty; the weights leave one row out, which holds garbage, and halve another."""
    row = Row(losses.kto, kto, references.kto, ANSWERS)
    x = make(row, seed=seed, B=8) | {"weight": np.float32([1, 1, 0, 1, 0.5, 1, 1, 1])}
    x["mask"][3] = True
    dirty = {name: x[name].copy() for name in ("logp", "ref_logp")}
    dirty["logp"][2] = np.nan
    return x, jax.tree.map(jnp.asarray, x | dirty)


def test_the_kl_is_clamped_at_0_and_a_constant():
    x = jax.tree.map(jnp.asarray, make(Row(losses.kto, kto, references.kto, ANSWERS)))
    np.testing.assert_array_equal(kto(x, -2.0), kto(x, 0.0))
    np.testing.assert_array_equal(kto(x, 0.0), losses.apo_zero_unpaired(answers(x), x["desirable"]))
    for loss in (kto, bco):
        assert not np.allclose(loss(x, 2.0), loss(x, 0.0))
        assert jax.grad(lambda number, loss=loss: jnp.sum(loss(x, number)))(2.0) == 0


@pytest.mark.parametrize("statistic", [losses.mismatched_kl, losses.mean_reward])
def test_no_gradient_to_the_numbers_of_a_batch(statistic):
    x = jax.tree.map(jnp.asarray, batch()[0])
    gradient = jax.grad(lambda logp: statistic(Response(logp, x["ref_logp"], x["mask"])).value())(x["logp"])
    np.testing.assert_array_equal(gradient, 0.0)


def test_one_class_alone_is_a_batch():
    x = jax.tree.map(jnp.asarray, make(Row(losses.kto, kto, references.kto, ANSWERS)))
    for good in (True, False):
        alone = x | {"desirable": jnp.full(4, good)}
        np.testing.assert_allclose(kto(alone), references.kto(jax.device_get(alone)), rtol=2e-6)
        assert np.all(np.isfinite(jax.grad(lambda logp, alone=alone: jnp.sum(kto(alone | {"logp": logp})))(x["logp"])))


def test_a_good_answer_is_pushed_up_and_a_bad_one_down_and_each_saturates():
    ones = jnp.ones((4, 1))
    x = Response(jnp.array([[0.0], [0.0], [90.0], [-90.0]]), 0 * ones, ones)

    def total(logp, good):
        return jnp.sum(losses.kto(x._replace(logp=logp), good, 0.0))

    gradient = jax.grad(total)(x.logp, jnp.array([True, False, True, False]))[:, 0]
    np.testing.assert_allclose(gradient[:2], [-0.025, 0.025], rtol=1e-6)  # beta / 4
    assert np.all(np.abs(gradient[2:]) < 1e-4)


def test_statistics_are_those_of_the_loop_and_parts_add_up():
    x, dirty = batch()
    for statistic, reference in (
        (losses.mismatched_kl, references.mismatched_kl),
        (losses.mean_reward, references.mean_reward),
    ):
        whole = statistic(answers(dirty), dirty["weight"])
        # weights that are 0 are no part of it, whatever stands there: the loop leaves the row out
        np.testing.assert_allclose(whole.value(), reference(x), rtol=1e-6)
        parts = [
            statistic(answers(part), part["weight"])
            for part in (jax.tree.map(lambda a, i=i: a[i::2], dirty) for i in range(2))
        ]
        np.testing.assert_allclose(Mean(*map(sum, zip(*parts, strict=True))).value(), whole.value(), rtol=1e-6)
    assert losses.mismatched_kl(answers(dirty), dirty["weight"]).count == 5.5  # one row is empty, one weighs nothing
    assert losses.mean_reward(answers(dirty), dirty["weight"]).count == 6.5
    nothing = losses.mismatched_kl(answers(dirty), 0 * dirty["weight"])
    assert nothing.value() == 0


def test_the_running_delta_is_the_mean_of_all():
    batches = np.random.default_rng(0).normal(size=(3, 5))
    delta, count = 7.0, 0.0  # what it was before anything was seen does not matter
    for seen, rewards in enumerate(batches, start=1):
        delta, count = losses.bco_delta(delta, count, Mean(jnp.sum(rewards), jnp.asarray(5.0)))
        np.testing.assert_allclose(delta, batches[:seen].mean(), rtol=1e-6, atol=1e-6)
        assert count == 5 * seen
    same, _ = losses.bco_delta(delta, count, Mean(jnp.zeros(()), jnp.zeros(())))
    assert same == delta and losses.bco_delta(1.5, 0.0, Mean(jnp.zeros(()), jnp.zeros(())))[0] == 1.5


def test_a_certain_prompt_weighs_no_more_than_the_limit():
    np.testing.assert_array_equal(losses.udm_weights(jnp.array([0.0, 1.0])), [0.5, 10.0])
    np.testing.assert_array_equal(jax.grad(lambda p: jnp.sum(losses.udm_weights(p)))(jnp.full(2, 0.6)), 0.0)


@pytest.mark.parametrize(
    ("name", "call"),
    {
        "kto": lambda x, **hyper: losses.kto(x, jnp.ones(2), 0.0, **hyper),
        "apo_zero_unpaired": lambda x, **hyper: losses.apo_zero_unpaired(x, jnp.ones(2), **hyper),
        "bco": lambda x, **hyper: losses.bco(x, jnp.ones(2), 0.0, **hyper),
        "mean_reward": losses.mean_reward,
        "mismatched_kl": losses.mismatched_kl,
    }.items(),
)
def test_a_beta_that_is_not_above_0_and_a_missing_reference_are_refused(name, call):
    x = Response(jnp.zeros((2, 1)), jnp.zeros((2, 1)), jnp.ones((2, 1)))
    with pytest.raises(ValueError, match=f"{name}: ref_logp is None"):
        call(x._replace(ref_logp=None))
    for beta in () if name == "mismatched_kl" else (0, -0.1, jnp.float32(np.nan)):
        with pytest.raises(ValueError, match=rf"{name}: beta=.*expected beta > 0"):
            call(x, beta=beta)


def test_refusals():
    x = jax.tree.map(jnp.asarray, make(Row(losses.kto, kto, references.kto, ANSWERS)))
    with pytest.raises(ValueError, match=r"kto: kl of shape \(4,\); expected one number for the whole batch"):
        kto(x, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"bco: delta of shape \(4,\); expected one number for the whole batch"):
        bco(x, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"undesirable_weight of shape \(3,\); expected a number or \(4,\)"):
        bco(x, undesirable_weight=jnp.ones(3))
    with pytest.raises(ValueError, match=r"udm_weights: low=2\.0, high=1\.0; expected 0 <= low <= high"):
        losses.udm_weights(jnp.ones(2), low=2.0, high=1.0)
    with pytest.raises(ValueError, match=r"udm_weights: probability=1.5; expected 0 <= probability <= 1"):
        losses.udm_weights(jnp.array([0.5, 1.5]))
    for name, loss in (("kto", kto), ("bco", bco)):
        with pytest.raises(ValueError, match=f"{name}: desirable=-1; expected 0 or 1"):
            loss(x | {"desirable": jnp.array([1, -1, 1, -1])})


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "kto": Row(
            losses.kto,
            kto,
            references.kto,
            ANSWERS,
            {"kl": 0.4, "beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.33},
        ),
        "kto_row_weights": Row(
            losses.kto,
            lambda x, **hyper: kto(x, undesirable_weight=x["weight"], **hyper),
            references.kto,
            ANSWERS | WEIGHT,
        ),
        "apo_zero_unpaired": Row(
            losses.apo_zero_unpaired,
            lambda x, **hyper: losses.apo_zero_unpaired(answers(x), x["desirable"], **hyper),
            references.apo_zero_unpaired,
            ANSWERS,
            {"beta": 0.3},
        ),
        "bco": Row(losses.bco, bco, references.bco, ANSWERS, {"delta": 0.2, "beta": 0.3, "undesirable_weight": 1.4}),
        "bco_row_weights": Row(
            losses.bco,
            lambda x, **hyper: bco(x, undesirable_weight=x["weight"], **hyper),
            references.bco,
            ANSWERS | WEIGHT,
        ),
        "udm_weights": Row(
            losses.udm_weights,
            lambda x, **hyper: bco(x, undesirable_weight=losses.udm_weights(x["weight"], **hyper)),
            lambda x, **hyper: references.bco(x | {"weight": references.udm_weights(x, **hyper)}),
            ANSWERS | WEIGHT,
            {"low": 0.6, "high": 1.2},
        ),
    }
