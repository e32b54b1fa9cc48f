"""What is particular to losses without a reference."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, logp, pairwise
from references import reference_free as references
from vectors.common import response

from alignax import losses
from alignax.losses._logistic import log1mexp
from alignax.types import Response

FREE = {name: i for name, i in PAIR.items() if i.differentiable}
SIMPO = functools.partial(losses.simpo, gamma=0.5)
RATIO = losses.simpo  # 0.25, without either
HINGE = functools.partial(losses.simpo_hinge, gamma=0.5)
ALL = (losses.cpo, losses.slic_hf, SIMPO, RATIO, HINGE, losses.alphapo, losses.orpo)


@pytest.mark.parametrize("loss", ALL)
def test_a_reference_is_not_looked_at(loss):
    chosen, rejected = response([-6.0], None, [3]), response([-9.0], None, [2])
    with_reference = [side._replace(ref_logp=side.logp * jnp.nan) for side in (chosen, rejected)]
    np.testing.assert_array_equal(loss(*with_reference), loss(chosen, rejected))


@pytest.mark.parametrize(
    "loss, constant",
    [
        (losses.cpo, math.log(2)),
        (SIMPO, math.log(1 + math.exp(0.5))),
        (RATIO, math.log(1 + math.exp(0.5))),
        (HINGE, 1.5),
        (losses.alphapo, math.log(1 + math.exp(0.1))),
        (losses.orpo, 0.1 * math.log(2)),
        (functools.partial(losses.slic_hf, target_weight=0.0), 1.0),
    ],
)
def test_the_same_answer_twice(loss, constant):
    same = response([-20.0], None, [10])
    np.testing.assert_allclose(loss(same, same), constant, rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.cpo, SIMPO, HINGE, functools.partial(losses.slic_hf, target_weight=0.0)])
def test_shifts_of_both_sides_do_not_matter(loss):
    chosen, rejected = response([-6.0], None, [3]), response([-9.0], None, [3])
    shifted = [side._replace(logp=side.logp - 4.0) for side in (chosen, rejected)]
    np.testing.assert_allclose(loss(*shifted), loss(chosen, rejected), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.simpo, losses.simpo_hinge])
def test_both_forms_of_the_margin_are_refused_and_neither_is_the_authors_ratio(loss):
    same = response([-20.0])
    np.testing.assert_allclose(loss(same, same), loss(same, same, gamma=2.0 * 0.25))
    with pytest.raises(ValueError, match=rf"{loss.__name__}: gamma=.*gamma_beta_ratio=.*expected at most one"):
        loss(same, same, gamma=0.5, gamma_beta_ratio=0.25)


@pytest.mark.parametrize("loss", [losses.cpo, SIMPO])
@pytest.mark.parametrize("label_smoothing", [0.5, -0.1, 1, jnp.float32(0.9)])
def test_label_smoothing_out_of_range_is_refused(loss, label_smoothing):
    same = response([-20.0])
    with pytest.raises(ValueError, match=r"label_smoothing=.*expected 0 <= label_smoothing < 0.5"):
        loss(same, same, label_smoothing=label_smoothing)


def test_alphapo_of_0_is_simpo_and_either_sign_has_a_gradient():
    chosen, rejected = response([-6.0], None, [3]), response([-9.0], None, [2])
    plain = losses.simpo(chosen, rejected, beta=2.5, gamma=0.1)
    np.testing.assert_allclose(losses.alphapo(chosen, rejected, alpha=0.0), plain, rtol=1e-6)
    for alpha in (1e-4, -1e-4):
        np.testing.assert_allclose(losses.alphapo(chosen, rejected, alpha=alpha), plain, rtol=3e-3)
    slope = jax.jit(jax.grad(lambda x, a: losses.alphapo(chosen._replace(logp=x), rejected, alpha=a).sum()))
    for alpha in (0.25, 0.0, -0.5):
        assert np.all(np.asarray(slope(chosen.logp, alpha))[np.asarray(chosen.mask)] < 0)


def test_slic_hf_is_a_scaled_hinge_and_learns_its_target():
    chosen, rejected = response([-6.0]), response([-6.5])
    with_target = chosen._replace(extra={"target_logp": jnp.array([-3.0])})
    np.testing.assert_allclose(losses.slic_hf(chosen, rejected), 0.5 + 0.6, rtol=1e-6)
    np.testing.assert_allclose(losses.slic_hf(with_target, rejected), 0.5 + 0.3, rtol=1e-6)
    np.testing.assert_allclose(
        losses.slic_hf(chosen, rejected, delta=4.0, target_weight=0.0), 4 * (1 - 0.5 / 4), rtol=1e-6
    )
    two = [response([-6.0, -7.0]), response([-6.5, -8.0])]
    with pytest.raises(AssertionError, match="shape"):  # it would be spread over the pairs
        losses.slic_hf(two[0]._replace(extra=with_target.extra), two[1])
    gradient = jax.grad(lambda t: losses.slic_hf(chosen._replace(extra={"target_logp": t}), rejected).sum())
    np.testing.assert_allclose(gradient(jnp.array([-3.0])), [-0.1], rtol=1e-6)


def test_log1mexp_keeps_its_digits_and_its_gradient_at_0():
    x = jnp.array([-1e-5, -0.3, -0.7, -5.0, -30.0, -80.0], jnp.float32)
    exact = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in np.asarray(x, np.float64)]
    value, gradient = jax.jit(lambda x: (log1mexp(x), jax.grad(lambda x: log1mexp(x).sum())(x)))(x)
    np.testing.assert_allclose(value, exact, rtol=2e-6)
    slope = [-math.exp(v) / -math.expm1(v) for v in np.asarray(x, np.float64)]
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-30)
    run = jax.jit(jax.value_and_grad(log1mexp))
    at_zero, gradient = run(np.float32(0))
    np.testing.assert_allclose([at_zero, gradient], [math.log(1e-6), 0.0], rtol=1e-6)
    assert np.isfinite(run(np.float32(-np.inf))[0]) and run(np.float32(3))[0] == at_zero


def test_certain_answers_have_finite_odds():
    sure = Response(jnp.zeros((1, 2)), None, jnp.ones((1, 2)))
    unsure = response([-6.0], None, [2])
    run = jax.jit(jax.value_and_grad(lambda x: losses.orpo(sure._replace(logp=x), unsure).sum()))
    value, gradient = run(sure.logp)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


TARGET = Input("B", None, True, logp)
SMOOTH = {"beta": 0.7, "gamma": 0.6, "label_smoothing": 0.3}


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "cpo": Row(losses.cpo, pairwise(losses.cpo), references.cpo, FREE, {"beta": 0.3, "label_smoothing": 0.3}),
        "slic_hf": Row(
            losses.slic_hf, pairwise(losses.slic_hf), references.slic_hf, FREE, {"delta": 2.0, "target_weight": 0.4}
        ),
        "slic_hf_target": Row(
            losses.slic_hf,
            pairwise(losses.slic_hf, "target_logp"),
            references.slic_hf,
            FREE | {"chosen_target_logp": TARGET},
            {"delta": 2.0, "target_weight": 0.4},
        ),
        "simpo": Row(losses.simpo, pairwise(SIMPO), references.simpo, FREE, SMOOTH),
        "simpo_ratio": Row(
            losses.simpo, pairwise(RATIO), references.simpo_ratio, FREE, {"beta": 0.7, "gamma_beta_ratio": 0.6}
        ),
        "simpo_hinge": Row(
            losses.simpo_hinge, pairwise(HINGE), references.simpo_hinge, FREE, {"beta": 0.7, "gamma": 0.6}
        ),
        "alphapo": Row(
            losses.alphapo,
            pairwise(losses.alphapo),
            references.alphapo,
            FREE,
            {"beta": 0.7, "gamma": 0.6, "alpha": -0.4},
            rtol=5e-6,
        ),
        "orpo": Row(losses.orpo, pairwise(losses.orpo), references.orpo, FREE, {"odds_weight": 0.8}, rtol=1e-5),
    }
