"""What is particular to self-play losses: which label they agree with, what is a constant, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import CONSTANT, LOGP, PAIR, Input, Properties, Row, make, pairwise, probability, tokenwise
from references import online as references

from alignax import losses
from alignax.types import Response

NASH = {"logp": LOGP, "ref_logp": CONSTANT, "preference": Input("B", mask=None, make=probability)}
SOFT = PAIR | {"chosen_preference": Input("B", mask=None, make=probability)}


def one_of_two(first):
    """Which side the reference sampled, and of the other side the contrary: in turns."""
    return Input("B", mask=None, make=lambda rng, shape, scale: (np.arange(shape[0]) % 2 == 0) ^ (not first))


SAMPLED = PAIR | {"chosen_from_reference": one_of_two(True), "rejected_from_reference": one_of_two(False)}


def side(logp, ref_logp, **extra):
    """Responses of one token each."""
    logp, ref_logp = (jnp.asarray(x, jnp.float32)[:, None] for x in (logp, ref_logp))
    return Response(logp, ref_logp, jnp.ones(logp.shape, bool), {k: jnp.asarray(v) for k, v in extra.items()})


def hard_forms(name, p):
    first, second = side([-3.0, -1.0], [-4.0, -2.5]), side([-5.0, -2.0], [-4.5, -1.0])
    soft = getattr(losses, f"{name}_soft")(side([-3.0, -1.0], [-4.0, -2.5], preference=[p, p]), second, beta=0.3)
    hard = getattr(losses, name)
    return soft, hard(first, second, beta=0.3), hard(second, first, beta=0.3)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_certain_labels_are_the_hard_loss(name):
    soft, won, lost = hard_forms(name, 1.0)
    np.testing.assert_allclose(soft, won, rtol=1e-6)
    soft, won, lost = hard_forms(name, 0.0)
    np.testing.assert_allclose(soft, lost, rtol=1e-6)


def test_soft_losses_are_expectations_over_labels():
    soft, won, lost = hard_forms("dpo", 0.7)
    np.testing.assert_allclose(soft, 0.7 * won + 0.3 * lost, rtol=1e-6)
    soft, won, lost = hard_forms("ipo", 0.7)  # up to the variance of the label, (1 / (2 beta))^2 - ((p - 1/2) / beta)^2
    np.testing.assert_allclose(soft, 0.7 * won + 0.3 * lost - (0.25 - 0.04) / 0.09, rtol=1e-5)


def test_a_divergence_takes_the_place_of_the_log_ratio():
    first, second = side([-1.0], [-1.5], preference=[0.8]), side([-3.0], [-2.0])
    d = np.log(1 / (1 + np.exp(-0.5))) - np.log(1 / (1 + np.exp(1.0)))
    divergence = losses.f_jensen_shannon
    np.testing.assert_allclose(losses.ipo_soft(first, second, beta=0.5, divergence=divergence), [(d - 0.6) ** 2], 1e-5)
    expected = np.log1p(np.exp(0.5 * d)) - 0.8 * 0.5 * d
    np.testing.assert_allclose(losses.dpo_soft(first, second, beta=0.5, divergence=divergence), [expected], 1e-5)


@pytest.mark.parametrize("loss", [losses.dpo_soft, losses.ipo_soft])
@pytest.mark.parametrize("preference", [1.5, -0.1, float("nan")])
def test_a_preference_that_is_no_probability_is_refused(loss, preference):
    with pytest.raises(ValueError, match=r"extra\['preference'\]=.*; expected probabilities, from 0 to 1"):
        loss(side([-1.0], [-1.0], preference=[preference]), side([-2.0], [-2.0]))


@pytest.mark.parametrize("loss", [losses.nash_md, losses.nash_md_sequence, losses.nash_md_trl])
def test_a_policy_gradient_refuses_it_too(loss):
    x = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=rf"{loss.__name__}: preference=1\.5; expected probabilities"):
        loss(x, x, jnp.array([1.5]), x + 1)


def test_what_a_loss_needs_is_said():
    assert losses.needed(losses.dpo_soft) == losses.needed(losses.ipo_soft) == ("preference",)
    assert losses.needed(functools.partial(losses.xpo, beta=0.2)) == ("from_reference",)
    with pytest.raises(ValueError, match=r"xpo: Response.extra holds \[\]; expected 'from_reference' among them"):
        losses.xpo(side([-1.0], [-1.0]), side([-2.0], [-2.0]))


def test_xpo_takes_probability_from_the_reference_s_sample():
    # whichever side it is: the plus sign is optimism
    def gradient(first, second):
        def loss(x):
            chosen = side(x[:1], [-2.0], from_reference=[first])
            return jnp.sum(losses.xpo(chosen, side(x[1:], [-2.0], from_reference=[second]), alpha=0.25))

        return jax.grad(loss)(jnp.array([-2.0, -2.0]))

    np.testing.assert_allclose(gradient(False, True), [-0.05, 0.05 + 0.25], rtol=1e-6)
    np.testing.assert_allclose(gradient(True, False), [-0.05 + 0.25, 0.05], rtol=1e-6)
    with pytest.raises(ValueError, match="xpo: both sides of a pair are from the reference; expected one"):
        gradient(True, True)


def test_the_three_forms_of_the_kl():
    # d = 1, 0, 2 at three tokens: what each token answers for
    logp, ref_logp = jnp.array([[-1.0, -1.0, -1.0]]), jnp.array([[-2.0, -1.0, -3.0]])
    arguments = (ref_logp, jnp.array([0.5]), jnp.ones((1, 3)))
    for loss, expected in (
        (losses.nash_md, [3.0, 2.0, 2.0]),
        (losses.nash_md_sequence, [3.0, 3.0, 3.0]),
        (losses.nash_md_trl, [1.0, 0.0, 2.0]),
    ):
        gradient = jax.grad(lambda x, loss=loss: jnp.sum(loss(x, *arguments, kl_weight=1.0)))(logp)
        np.testing.assert_allclose(gradient, [expected], rtol=1e-6)


def gradient_of(reference):
    """The loss with its weights held at the point at which the property takes gradients."""

    @functools.cache
    def point():
        return make(Row(losses.nash_md, losses.nash_md, reference, NASH), seed=1)

    return lambda x, **hyper: reference(x, weights_from=point(), **hyper)


def nash(function, reference):
    call = tokenwise(function, *NASH)
    return Row(function, call, reference, NASH, {"kl_weight": 0.3}, gradient_of=gradient_of(reference))


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "dpo_soft": Row(
            losses.dpo_soft, pairwise(losses.dpo_soft, "preference"), references.dpo_soft, SOFT, {"beta": 0.5}
        ),
        "ipo_soft": Row(
            losses.ipo_soft, pairwise(losses.ipo_soft, "preference"), references.ipo_soft, SOFT, {"beta": 0.3}
        ),
        "xpo": Row(
            losses.xpo, pairwise(losses.xpo, "from_reference"), references.xpo, SAMPLED, {"beta": 0.5, "alpha": 0.02}
        ),
        "nash_md": nash(losses.nash_md, references.nash_md),
        "nash_md_sequence": nash(losses.nash_md_sequence, references.nash_md_sequence),
        "nash_md_trl": nash(losses.nash_md_trl, references.nash_md_trl),
    }
