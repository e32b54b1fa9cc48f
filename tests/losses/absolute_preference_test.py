"""What is particular to losses of each side's own log-ratio; what they share is in preference_test.py."""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, pairwise, probability
from references import absolute_preference as references

from alignax import losses
from alignax.types import Response

WIN_RATES = {f"{side}_win_rate": Input("B", mask=None, make=probability) for side in ("chosen", "rejected")}
KL = {"kl_chosen": 0.4, "kl_rejected": -0.2}


def side(x, **extra):
    """Responses of one token each, of these log-ratios."""
    logp = jnp.asarray(x, jnp.float32)[:, None]
    return Response(logp, jnp.zeros_like(logp), jnp.ones(logp.shape, bool), extra)


@functools.cache
def compiled(loss):
    return jax.jit(jax.grad(lambda *x: loss(*(side(jnp.stack([r])) for r in x))[0], (0, 1)))


def gradients(loss, chosen, rejected):
    """Of one pair of log-ratios, by each."""
    return compiled(loss)(float(chosen), float(rejected))


def test_apo_zero_drives_apart_and_apo_down_drives_down():
    chosen, rejected = gradients(losses.apo_zero, 0.5, -0.5)
    assert chosen < 0 < rejected  # descent raises the one and lowers the other
    chosen, rejected = gradients(losses.apo_down, 3.0, -3.0)
    assert chosen > 0 < rejected
    np.testing.assert_allclose(chosen, 0.1 * (slope(0.3) - slope(0.6)), rtol=1e-5)
    np.testing.assert_allclose(rejected, 0.1 * slope(0.6), rtol=1e-5)


def slope(x):
    return 1 / (1 + math.exp(-x)) / (1 + math.exp(x))


def test_apo_down_keeps_its_chosen_term():
    """f'(e^x) stands in the margin only, as in TRL."""
    chosen, rejected = side([1.0]), side([-2.0])
    loss = jax.jit(functools.partial(losses.apo_down, beta=0.5, divergence=losses.f_forward_kl))(chosen, rejected)
    margin = (1 - math.exp(-1)) - (1 - math.exp(2))
    np.testing.assert_allclose(loss, 1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.5 * margin)), rtol=1e-6)


def test_nca_brings_the_chosen_side_to_rest_at_log_2():
    np.testing.assert_allclose(gradients(losses.nca_pair, math.log(2) / 0.01, -50.0)[0], 0, atol=1e-9)
    assert gradients(losses.nca_pair, 50.0, 0.0)[0] < 0 < gradients(losses.nca_pair, 90.0, 0.0)[0]


def test_the_statistics_of_the_batch_are_constants_and_kls_are_clamped():
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def run(delta, kl_chosen, kl_rejected):
        pair = side([1.0, -1.5]), side([-0.5, 2.0])
        kto = losses.kto_pair(*pair, kl_chosen=kl_chosen, kl_rejected=kl_rejected)
        return jnp.sum(losses.bco_pair(*pair, delta=delta) + kto)

    def total(*numbers):
        return run(*numbers)[0]

    assert run(0.3, 0.4, 0.5)[1] == (0, 0, 0)
    assert total(0.0, -3.0, -0.1) == total(0.0, 0.0, 0.0)
    assert total(0.0, 0.4, 0.0) != total(0.0, 0.0, 0.0) != total(0.0, 0.0, 0.4)
    assert total(0.3, 0.0, 0.0) != total(0.0, 0.0, 0.0)


def test_statistics_are_numbers():
    pair = side([1.0, -1.5]), side([-0.5, 2.0])
    with pytest.raises(AssertionError, match="rank"):
        losses.bco_pair(*pair, delta=jnp.zeros(2))
    with pytest.raises(AssertionError, match="rank"):
        losses.kto_pair(*pair, kl_chosen=jnp.zeros(2), kl_rejected=0.0)


def test_bco_without_a_shift_is_two_classifications():
    np.testing.assert_allclose(
        losses.bco_pair(side([2.0]), side([-3.0]), beta=0.5),
        math.log1p(math.exp(-1)) + math.log1p(math.exp(-1.5)),
        1e-6,
    )


def test_sppo_rests_where_multiplicative_weights_lead():
    """At x = (P - 1/2) / beta the loss is 0; hard win rates are 1 and 0, and without the factor 1/2."""
    assert losses.needed(losses.sppo) == ("win_rate",)
    chosen, rejected = side([25.0], win_rate=jnp.array([0.75])), side([-12.5], win_rate=jnp.array([0.375]))
    np.testing.assert_allclose(losses.sppo(chosen, rejected, beta=0.01), 0.0, atol=1e-9)
    sure = side([3.0], win_rate=jnp.ones(1)), side([-1.0], win_rate=jnp.zeros(1))
    hard = losses.sppo_hard(side([3.0]), side([-1.0]), beta=0.1)
    np.testing.assert_allclose(hard, 2 * losses.sppo(*sure, beta=0.1), rtol=1e-6)
    np.testing.assert_allclose(hard, (3 - 5) ** 2 + (-1 + 5) ** 2, rtol=1e-6)


def test_sppo_says_what_it_needs():
    with pytest.raises(ValueError, match=r"sppo: Response.extra holds \[\]; expected 'win_rate' among them"):
        losses.sppo(side([1.0]), side([1.0]))


@pytest.mark.parametrize("win_rate", [-0.1, 1.5, math.nan])
def test_a_win_rate_that_is_no_probability_is_refused(win_rate):
    pair = side([1.0], win_rate=jnp.array([0.5])), side([1.0], win_rate=jnp.array([win_rate]))
    with pytest.raises(ValueError, match=r"sppo: win_rate=.*expected 0 <= win_rate <= 1"):
        losses.sppo(*pair)


def test_win_rates_are_constants():
    def total(win_rate):
        return jnp.sum(losses.sppo(side([1.0], win_rate=win_rate), side([2.0], win_rate=win_rate)))

    assert jax.jit(jax.grad(total))(np.float32([0.7])) == 0


def row(name, hyper, **more):
    loss = functools.partial(getattr(losses, name), **more)
    reference = functools.partial(getattr(references, name), **more)
    return Row(getattr(losses, name), pairwise(loss), reference, PAIR, hyper)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "apo_zero": row("apo_zero", {"beta": 0.3}),
        "apo_down": row("apo_down", {"beta": 0.3}),
        "nca_pair": row("nca_pair", {"beta": 0.3}),
        "bco_pair": row("bco_pair", {"beta": 0.3, "delta": 0.2}),
        "kto_pair": row("kto_pair", {"beta": 0.3, "kl_chosen": 1.5, "kl_rejected": 0.3}, **KL),
        "sppo": Row(
            losses.sppo, pairwise(losses.sppo, "win_rate"), references.sppo, {**PAIR, **WIN_RATES}, {"beta": 0.2}
        ),
        "sppo_hard": row("sppo_hard", {"beta": 0.2}),
    }
