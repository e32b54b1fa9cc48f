"""What is particular to losses made of others."""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, make, pairwise
from references import mixtures as references

from alignax import losses
from alignax.losses.extras import needs_whole_batch
from alignax.types import Response

P2 = {f"{side}_log_sum_p2": Input(mask=f"{side}_mask") for side in ("chosen", "rejected")}


def random_pair(seed=3, **extra):
    x = make(Row(losses.dpo, losses.dpo, losses.dpo, PAIR | P2), seed=seed)

    def side(name):
        names = ("logp", "ref_logp", "mask", "log_sum_p2")
        logp, ref_logp, mask, log_sum_p2 = (jnp.asarray(x[f"{name}_{array}"]) for array in names)
        return Response(logp, ref_logp, mask, {"log_sum_p2": log_sum_p2, **extra})

    return side("chosen"), side("rejected")


def test_a_weight_of_the_policys_own_answers():
    """1 where log p is what a sample has on average; the square of e for a nat above it on both sides, clamped to 1."""
    chosen, rejected = random_pair()
    even = [side._replace(extra={"log_sum_p2": side.logp}) for side in (chosen, rejected)]
    np.testing.assert_allclose(losses.wpo()(*even), losses.dpo(chosen, rejected), rtol=1e-6)
    above = [side._replace(extra={"log_sum_p2": side.logp - 1}) for side in (chosen, rejected)]
    np.testing.assert_allclose(losses.wpo()(*above), losses.dpo(chosen, rejected), rtol=1e-6)
    rows = np.asarray(chosen.mask.any(axis=1))
    both = math.exp(2) * losses.dpo(chosen, rejected)
    np.testing.assert_allclose(losses.wpo(clamp=None)(*above)[rows], both[rows], rtol=1e-5)
    np.testing.assert_allclose(losses.wpo(clamp=1.5)(*above)[rows], 1.5 / math.exp(2) * both[rows], rtol=1e-5)


def test_the_weight_carries_no_gradient():
    chosen, rejected = random_pair()

    @jax.jit
    def run(logp):
        def of(logp, loss):
            value = loss(chosen._replace(logp=logp), rejected)
            return value.sum(), value

        return [jax.grad(of, has_aux=True)(logp, loss) for loss in (losses.wpo(), losses.dpo)]

    (gradient, weighted), (plain, value) = jax.tree.map(np.asarray, run(chosen.logp))
    weight = weighted / value
    assert np.any(weight < 0.99)
    np.testing.assert_allclose(gradient, weight[:, None] * plain, rtol=1e-5, atol=1e-8)


def test_wpo_of_another_loss_keeps_its_name_needs_and_hyperparameters():
    loss = losses.wpo(losses.odpo, clamp=None)
    assert loss.__name__ == "wpo_odpo" and (loss.__doc__ or "").startswith("WPO of odpo: ")
    assert losses.needed(loss) == ("margin", "log_sum_p2") and losses.needed(losses.odpo) == ("margin",)
    assert losses.needed(losses.wpo()) == ("log_sum_p2",) and losses.needed(losses.dpo) == ()
    assert inspect.signature(loss).parameters["beta"].default == 0.1
    chosen, rejected = random_pair(margin=jnp.zeros(4))
    same = losses.wpo(clamp=None)(chosen, rejected, beta=0.4)
    np.testing.assert_allclose(loss(chosen, rejected, beta=0.4), same, rtol=1e-6)
    assert losses.wpo(functools.partial(losses.dpo, beta=0.3)).__name__ == "wpo_dpo"
    with pytest.raises(ValueError, match=r"wpo: Response.extra holds .*'log_sum_p2'"):
        losses.wpo()(chosen._replace(extra={}), rejected)


def test_wpo_of_a_loss_over_the_batch_or_clamped_at_nothing_is_refused():
    with pytest.raises(ValueError, match="wpo: clamp=0; expected clamp > 0"):
        losses.wpo(clamp=0)
    with pytest.raises(ValueError, match="wpo: aot needs the whole batch"):
        losses.wpo(losses.aot)


def test_a_mixture_is_a_sum():
    chosen, rejected = random_pair()
    sum_of = 0.8 * losses.dpo(chosen, rejected) + 0.5 * losses.orpo(chosen, rejected)
    np.testing.assert_allclose(losses.mixture({losses.dpo: 0.8, losses.orpo: 0.5})(chosen, rejected), sum_of, rtol=1e-6)
    twice = losses.mixture([(0.25, losses.dpo), (0.75, losses.dpo)])
    np.testing.assert_allclose(twice(chosen, rejected), losses.dpo(chosen, rejected), rtol=1e-6)
    with pytest.raises(ValueError, match="mixture: no parts"):
        losses.mixture({})


def test_a_hyperparameter_goes_to_the_parts_that_take_it():
    chosen, rejected = random_pair()
    loss = losses.mixture([(1.0, losses.dpo), (0.5, losses.orpo), (2.0, functools.partial(losses.ipo, beta=0.7))])
    parts = losses.dpo(chosen, rejected, beta=0.3) + 0.5 * losses.orpo(chosen, rejected, odds_weight=0.2)
    parts += 2 * losses.ipo(chosen, rejected, beta=0.7)
    np.testing.assert_allclose(loss(chosen, rejected, beta=0.3, odds_weight=0.2), parts, rtol=1e-6)
    parameters = inspect.signature(loss).parameters
    assert list(parameters) == ["chosen", "rejected", "beta", "label_smoothing", "divergence", "odds_weight"]
    assert parameters["beta"].default == 0.1 and parameters["chosen"].annotation is Response
    with pytest.raises(ValueError, match=r"1.0 dpo \+ 0.5 orpo \+ 2.0 ipo: no part takes \['gamma', 'tau'\]"):
        loss(chosen, rejected, beta=0.3, tau=0.1, gamma=0.0)


def test_a_mixture_needs_what_its_parts_need():
    loss = losses.mixture([(1.0, losses.odpo), (1.0, losses.wpo(losses.tdpo2)), (1.0, losses.odpo)])
    assert losses.needed(loss) == ("margin", "forward_kl", "log_sum_p2")
    assert loss.__name__ == "odpo_wpo_tdpo2_odpo" and loss.__doc__ == "Mixture: 1.0 odpo + 1.0 wpo_tdpo2 + 1.0 odpo."
    assert not needs_whole_batch(loss)
    whole = losses.mixture({losses.dpo: 0.5, losses.aot: 0.5})
    assert needs_whole_batch(whole)
    chosen, rejected = random_pair()
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    np.testing.assert_allclose(
        whole(chosen, rejected, weights=weights),
        (losses.dpo(chosen, rejected) + losses.aot(chosen, rejected, weights=weights)) / 2,
        rtol=1e-6,
    )


def test_mpo_is_the_mixture_it_says():
    chosen, rejected = random_pair()
    mixed = losses.mixture({losses.dpo: 0.8, losses.bco_pair: 0.2})(chosen, rejected, beta=0.3, delta=0.4)
    np.testing.assert_allclose(losses.mpo(chosen, rejected, beta=0.3, delta=0.4), mixed, rtol=1e-6)


WPO = Row(losses.wpo, pairwise(losses.wpo(), "log_sum_p2"), references.wpo, PAIR | P2, {"beta": 0.3}, rtol=1e-5)
FIXED = make(WPO, seed=1)  # where the gradient is looked at


def of_fixed_weight(clamp):
    return functools.partial(references.wpo, clamp=clamp, constant=FIXED)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "wpo": WPO._replace(gradient_of=of_fixed_weight(1.0)),
        "wpo_unclamped": WPO._replace(
            call=pairwise(losses.wpo(clamp=None), "log_sum_p2"),
            reference=functools.partial(references.wpo, clamp=math.inf),
            gradient_of=of_fixed_weight(math.inf),
        ),
        "mpo": Row(losses.mpo, pairwise(losses.mpo), references.mpo, PAIR, {"beta": 0.3, "delta": 0.4}),
    }
