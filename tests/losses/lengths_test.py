"""What is particular to losses that know of lengths."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Properties, Row, make, pairwise
from references import lengths as references
from vectors.common import response

from alignax import losses
from alignax.types import Response

FORMS = (losses.r_dpo, losses.dpo_average, losses.ld_dpo, losses.ld_dpo_policy)


def random_pair(seed=3):
    x = make(Row(losses.dpo, losses.dpo, losses.dpo, PAIR), seed=seed)

    def side(name):
        logp, ref_logp, mask = (jnp.asarray(x[f"{name}_{array}"]) for array in ("logp", "ref_logp", "mask"))
        return Response(logp, ref_logp, mask)

    return side("chosen"), side("rejected")


def test_a_longer_chosen_side_learns_less():
    @jax.jit
    @jax.value_and_grad
    def run(logp, chosen, rejected):
        return losses.r_dpo(chosen._replace(logp=logp), rejected, alpha=0.1).sum()

    def pull(length):  # of nine columns each
        both = response([-5.0, 0.0], [-5.0, 0.0], [length, 9])
        chosen, rejected = jax.tree.map(lambda x: np.asarray(x)[:1], both), response([-6.0], [-6.0], [4])
        value, gradient = jax.tree.map(np.asarray, run(chosen.logp, chosen, rejected))
        return value, -gradient[0, 0]

    (short, strong), (even, middle), (long, weak) = pull(1), pull(4), pull(9)
    assert strong > middle > weak > 0 and short > even > long
    np.testing.assert_allclose(even, math.log(2), rtol=1e-6)


@pytest.mark.parametrize("loss", FORMS)
def test_the_same_answer_twice_is_log_2(loss):
    chosen, rejected = response([-20.0], [-21.0], [10]), response([-20.0], [-21.0], [10])
    np.testing.assert_allclose(loss(chosen, rejected), math.log(2), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.r_dpo, losses.dpo_average, losses.ld_dpo])
def test_policy_and_reference_shifted_alike_change_nothing(loss):
    """Not of `ld_dpo_policy`, whose reference keeps tokens that the policy loses."""
    chosen, rejected = random_pair()
    shifted = Response(chosen.logp + 0.5, jnp.asarray(chosen.ref_logp) + 0.5, chosen.mask)
    np.testing.assert_allclose(loss(shifted, rejected), loss(chosen, rejected), rtol=1e-5)


def test_desensitised_not_at_all_is_dpo_and_wholly_is_a_cut():
    chosen, rejected = random_pair()
    forms = (losses.ld_dpo, losses.ld_dpo_policy)
    long, short = response([-8.0], [-7.0], [8]), response([-3.0], [-2.0], [2])
    cut, whole_reference = response([-2.0], [-7.0 / 4], [2]), response([-2.0], [-7.0], [2])

    @jax.jit
    def run():
        all_of_it = [loss(chosen, rejected, beta=0.3, alpha=1.0) for loss in forms]
        none_of_it = [loss(long, short, alpha=0.0) for loss in forms]
        expected = [losses.dpo(side, short) for side in (cut, whole_reference)]
        return losses.dpo(chosen, rejected, beta=0.3), all_of_it, none_of_it, expected

    whole, all_of_it, none_of_it, expected = jax.tree.map(np.asarray, run())
    for found in all_of_it:
        np.testing.assert_allclose(found, whole, rtol=1e-5)
    np.testing.assert_allclose(none_of_it, expected, rtol=1e-6)


def test_the_number_of_tokens_does_not_scale_averages():
    short, long = response([-4.0], [-6.0], [2]), response([-8.0], [-12.0], [4])
    other = response([-9.0], [-6.0], [3])
    np.testing.assert_allclose(losses.dpo_average(long, other), losses.dpo_average(short, other), rtol=1e-6)
    empty = response([0.0], [0.0], [1])
    empty = empty._replace(mask=empty.mask & False)
    np.testing.assert_allclose(losses.dpo_average(empty, empty), math.log(2), rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_a_weight_out_of_range_is_refused(alpha):
    for loss in (losses.ld_dpo, losses.ld_dpo_policy):
        with pytest.raises(ValueError, match=rf"{loss.__name__}: alpha=.*expected 0 <= alpha <= 1"):
            loss(*random_pair(), alpha=alpha)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "r_dpo": Row(losses.r_dpo, pairwise(losses.r_dpo), references.r_dpo, PAIR, {"beta": 0.3, "alpha": 0.2}),
        "dpo_average": Row(
            losses.dpo_average, pairwise(losses.dpo_average), references.dpo_average, PAIR, {"beta": 0.7}
        ),
        "ld_dpo": Row(losses.ld_dpo, pairwise(losses.ld_dpo), references.ld_dpo, PAIR, {"beta": 0.3, "alpha": 0.2}),
        "ld_dpo_policy": Row(
            losses.ld_dpo_policy,
            pairwise(losses.ld_dpo_policy),
            references.ld_dpo_policy,
            PAIR,
            {"beta": 0.3, "alpha": 0.2},
        ),
    }
