"""What is particular to the family of functions of the margin; what they share is in preference_test.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from properties import PAIR, Properties, Row, device, make, pairwise
from references import convex as references

from alignax import losses

NAMES = ("logistic", "hinge", "squared", "exponential", "truncated_quadratic", "savage")


def test_members_of_the_family_go_by_other_names():
    row = TestRows.rows["gpo"]
    x = device(make(row, scale=3.0))

    def gpo(convex, **hyper):
        return pairwise(functools.partial(losses.gpo, convex=convex))(x, **hyper)

    np.testing.assert_allclose(gpo(losses.gpo_logistic, beta=0.3), pairwise(losses.dpo)(x, beta=0.3), rtol=1e-6)
    np.testing.assert_allclose(gpo(losses.gpo_hinge, beta=0.3), pairwise(losses.hinge)(x, beta=0.3), rtol=1e-6)
    ipo = pairwise(losses.ipo)(x, beta=0.15)
    np.testing.assert_allclose(gpo(losses.gpo_squared, beta=0.3), 0.3**2 * ipo, rtol=1e-5)


def test_every_member_pulls_a_tie_apart():
    for name in NAMES:
        convex = getattr(losses, f"gpo_{name}")
        (slope,) = jax.grad(lambda z: jnp.sum(convex(z)))(jnp.zeros(1))
        assert slope < 0, name


def test_a_function_of_ones_own():
    x = device(make(TestRows.rows["gpo"]))
    ours = pairwise(functools.partial(losses.gpo, convex=lambda z: -z))(x, beta=0.5)
    margin = -pairwise(functools.partial(losses.gpo, convex=lambda z: z))(x, beta=1.0)
    np.testing.assert_allclose(ours, 0.5 * margin, rtol=1e-6)


def test_an_exponential_is_capped_far_from_the_reference():
    value, gradient = jax.value_and_grad(lambda z: jnp.sum(losses.gpo_exponential(z)))(jnp.array([-79.0, -81.0]))
    np.testing.assert_allclose(value, np.exp(79.0) + np.exp(80.0), rtol=1e-5)
    assert gradient[0] < 0 == gradient[1]


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "gpo": Row(losses.gpo, pairwise(losses.gpo), references.gpo(references.logistic), PAIR, {"beta": 0.3}),
        **{
            name: Row(
                getattr(losses, f"gpo_{name}"),
                pairwise(functools.partial(losses.gpo, convex=getattr(losses, f"gpo_{name}"))),
                references.gpo(getattr(references, name)),
                PAIR,
                {"beta": 0.3},
            )
            for name in NAMES
        },
    }
