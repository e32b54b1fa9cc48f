"""What is particular to losses that add to DPO's margin, or to DPO."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, pairwise, real
from references import variants as references
from vectors.common import response

from alignax import losses
from alignax.types import Response


def with_kl(kl_chosen, kl_rejected):
    """One pair, D = 1.5, of two tokens a side, the second one masked out and NaN."""

    def side(x, kl):
        logp, ref_logp, forward_kl = (jnp.array([[v, jnp.nan]]) for v in (x, 0.0, kl))
        return Response(logp, ref_logp, jnp.array([[1, 0]]), {"forward_kl": forward_kl})

    return side(1.0, kl_chosen), side(-0.5, kl_rejected)


def test_dpop_is_dpo_while_the_chosen_side_is_not_below_the_reference():
    up, down, rejected = response([-5.0], [-6.0]), response([-7.0], [-6.0]), response([-9.0], [-8.0])
    np.testing.assert_allclose(losses.dpop(up, rejected), losses.dpo(up, rejected, beta=0.3), rtol=1e-6)
    # -log sigmoid(0.3 (-1 + 1 - 50))
    np.testing.assert_allclose(losses.dpop(down, rejected), math.log1p(math.exp(15.0)), rtol=1e-6)

    def pull(weight):
        return jax.grad(lambda x: losses.dpop(down._replace(logp=x), rejected, penalty_weight=weight).sum())(down.logp)[
            0, 0
        ]

    np.testing.assert_allclose(pull(50.0), -0.3 * 51, rtol=1e-5)


def test_rpo_is_dpo_and_the_likelihood_of_the_chosen_side_only():
    chosen, rejected = response([-6.0], [-7.0], [3]), response([-8.0], [-7.5], [2])
    np.testing.assert_allclose(losses.rpo(chosen, rejected), losses.dpo(chosen, rejected) + 2.0, rtol=1e-6)
    np.testing.assert_allclose(losses.rpo(chosen, rejected, alpha=0.0), losses.dpo(chosen, rejected), rtol=1e-6)
    gradient = jax.grad(lambda a: losses.rpo(chosen, rejected, alpha=a).sum())(1.0)
    np.testing.assert_allclose(gradient, 2.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected 0 <= label_smoothing < 0.5"):
        losses.rpo(chosen, rejected, label_smoothing=0.5)


@pytest.mark.parametrize("loss", [losses.dpop, losses.tdpo1, losses.tdpo2, losses.mdpo])
def test_what_reads_one_side_by_itself_needs_a_reference(loss):
    chosen, rejected = with_kl(0.3, 0.7)
    for pair in ((chosen._replace(ref_logp=None), rejected), (chosen, rejected._replace(ref_logp=None))):
        with pytest.raises(ValueError, match=f"{loss.__name__}: ref_logp is None"):
            loss(*pair)


@pytest.mark.parametrize("loss", [losses.tdpo1, losses.tdpo2])
def test_tdpo_of_equal_divergences_is_dpo(loss):
    chosen, rejected = with_kl(0.3, 0.3)
    np.testing.assert_allclose(loss(chosen, rejected), losses.dpo(chosen, rejected), rtol=1e-6)
    np.testing.assert_allclose(loss(chosen, chosen), math.log(2), rtol=1e-6)


def test_tdpo_stops_the_gradient_of_the_chosen_divergence_in_version_2_only():
    chosen, rejected = with_kl(0.3, 0.7)

    def gradients(loss, **hyper):
        def total(kl_chosen, kl_rejected):
            sides = (s._replace(extra={"forward_kl": kl}) for s, kl in ((chosen, kl_chosen), (rejected, kl_rejected)))
            return loss(*sides, **hyper).sum()

        return jax.grad(total, argnums=(0, 1))(chosen.extra["forward_kl"], rejected.extra["forward_kl"])

    towards, away = gradients(losses.tdpo1)
    assert towards[0, 0] < 0 < away[0, 0] and towards[0, 1] == away[0, 1] == 0
    np.testing.assert_allclose(towards, -away)
    stopped, half = gradients(losses.tdpo2, alpha=1.0)
    np.testing.assert_array_equal(stopped, 0.0)
    np.testing.assert_allclose(half, away, rtol=1e-6)
    np.testing.assert_allclose(losses.tdpo2(chosen, rejected, alpha=1.0), losses.tdpo1(chosen, rejected), rtol=1e-6)
    with pytest.raises(ValueError, match=r"tdpo2: Response.extra holds \[\]; expected 'forward_kl'"):
        losses.tdpo2(chosen._replace(extra={}), rejected)


def degraded(chosen, logp, ref_logp, mask):
    return chosen._replace(extra={"degraded_logp": logp, "degraded_ref_logp": ref_logp, "degraded_mask": mask})


def test_mdpo_of_a_condition_that_changes_nothing():
    """The second summand is log 2; rows of another length hold the degraded condition."""
    chosen, rejected = response([-6.0], [-7.0], [3]), response([-8.0], [-7.5], [2])
    rows = (jnp.array([[jnp.nan, -3.0, -3.0]]), jnp.array([[0.0, -3.5, -3.5]]), jnp.array([[0, 1, 1]]))
    same = degraded(chosen, *rows)
    dpo, held = losses.dpo(chosen, rejected), math.log1p(math.exp(-0.1))
    np.testing.assert_allclose(losses.mdpo(same, rejected), dpo + math.log(2) + held, rtol=1e-6)
    alone = losses.mdpo(same, rejected, condition_weight=0.0, anchor_weight=0.0)
    np.testing.assert_allclose(alone, dpo, rtol=1e-6)
    np.testing.assert_allclose(
        losses.mdpo(same, rejected, condition_weight=0.0, anchor_weight=2.0, anchor=0.1),
        dpo + 2 * math.log(2),
        rtol=1e-6,
    )
    two = [jnp.concatenate([x, x]) for x in rows]
    with pytest.raises(AssertionError, match="shape"):
        losses.mdpo(degraded(chosen, *two), rejected)
    with pytest.raises(ValueError, match=r"mdpo.*'degraded_logp'"):
        losses.mdpo(chosen, rejected)


KL = {
    f"{side}_forward_kl": Input(mask=f"{side}_mask", differentiable=True, make=real) for side in ("chosen", "rejected")
}
STOPPED = KL | {"chosen_forward_kl": Input(mask="chosen_mask", make=real)}
DEGRADED = {
    f"chosen_degraded_{name}": Input(mask="chosen_degraded_mask", differentiable=name == "logp")
    for name in ("logp", "ref_logp")
}
MDPO = {"beta": 0.3, "anchor": 0.4, "condition_weight": 0.7, "anchor_weight": 1.5}


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "dpop": Row(losses.dpop, pairwise(losses.dpop), references.dpop, PAIR, {"beta": 0.1, "penalty_weight": 2.0}),
        "rpo": Row(
            losses.rpo, pairwise(losses.rpo), references.rpo, PAIR, {"beta": 0.3, "alpha": 0.4, "label_smoothing": 0.2}
        ),
        "tdpo1": Row(losses.tdpo1, pairwise(losses.tdpo1, "forward_kl"), references.tdpo1, PAIR | KL, {"beta": 0.3}),
        "tdpo2": Row(
            losses.tdpo2,
            pairwise(losses.tdpo2, "forward_kl"),
            references.tdpo2,
            PAIR | STOPPED,
            {"beta": 0.3, "alpha": 0.8},
        ),
        "mdpo": Row(
            losses.mdpo, pairwise(losses.mdpo, *losses.needed(losses.mdpo)), references.mdpo, PAIR | DEGRADED, MDPO
        ),
    }
