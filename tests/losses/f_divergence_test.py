"""Divergences as a choice inside a pairwise loss: here DPO's, whose rows they are held to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Properties, Row, pairwise
from references import f_divergence as references

from alignax import losses

X = jnp.linspace(-6, 6, 25)


def test_scores_are_0_at_the_reference():
    """And rise from there as log-ratios do, but for Jensen-Shannon, which is half a KL near the reference."""
    for divergence, slope in {
        losses.f_reverse_kl: 1.0,
        losses.f_forward_kl: 1.0,
        losses.f_jensen_shannon: 0.5,
        losses.f_alpha: 1.0,
    }.items():
        value, gradient = jax.value_and_grad(lambda x, f=divergence: jnp.sum(f(x)))(jnp.zeros(1))
        np.testing.assert_allclose([value, gradient[0]], [0, slope], atol=1e-7, err_msg=divergence.__name__)


def test_alpha_runs_from_the_reverse_to_the_forward_kl():
    np.testing.assert_allclose(losses.f_alpha(X, alpha=1.0), losses.f_forward_kl(X), rtol=1e-6)
    for alpha in (0.0, 1e-30, 1e-13, 1e-9):
        np.testing.assert_allclose(losses.f_alpha(X, alpha=alpha), X, rtol=1e-6, err_msg=str(alpha))
    # (1 - e^(-alpha x)) / alpha = x - alpha x^2 / 2 + ...: an alpha that is small and no longer nothing
    np.testing.assert_allclose(losses.f_alpha(jnp.array([100.0]), alpha=1e-5), [100 - 0.05 + 1e-4 / 6], rtol=5e-7)


def test_an_alpha_outside_0_to_1_is_refused():
    for alpha in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"f_alpha: alpha=.*expected 0 <= alpha <= 1"):
            losses.f_alpha(X, alpha=alpha)


def test_trl_scores_differ_by_a_constant_only():
    for ours, theirs in (
        (losses.f_forward_kl(X), -np.exp(-X)),
        (losses.f_jensen_shannon(X), -np.logaddexp(0, -X)),
        (losses.f_alpha(X, alpha=0.3), np.exp((0.7 - 1) * X) / (0.7 - 1)),  # coef 0.7
    ):
        difference = ours - theirs
        np.testing.assert_allclose(difference, np.full(25, difference[0]), rtol=1e-4)


def with_divergence(divergence, *names):
    """DPO with a divergence, whose hyperparameters have these names."""

    def call(x, **hyper):
        own = {name: hyper.pop(name) for name in names if name in hyper}
        loss = functools.partial(losses.dpo, divergence=functools.partial(divergence, **own) if own else divergence)
        return pairwise(loss)(x, **hyper)

    return call


class TestRows(Properties):
    rows = {  # noqa: RUF012
        name: Row(function, with_divergence(function, *hyper), references.dpo(score), PAIR, {"beta": 0.3, **hyper})
        for name, function, score, hyper in (
            ("reverse_kl", losses.f_reverse_kl, references.reverse_kl, {}),
            ("forward_kl", losses.f_forward_kl, references.forward_kl, {}),
            ("jensen_shannon", losses.f_jensen_shannon, references.jensen_shannon, {}),
            ("alpha", losses.f_alpha, references.alpha, {"alpha": 0.3}),
        )
    }
