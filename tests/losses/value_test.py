"""What is particular to losses of critics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import CONSTANT, LOGP, Properties, Row, tokenwise
from references import value as references

from alignax import losses

OLD = jnp.zeros((1, 5))
VALUES = jnp.array([[0.5, 0.5, -0.5, 0.1, 0.1]])
RETURNS = jnp.array([[1.0, -1.0, 1.0, 1.0, 0.1]])
MASK = jnp.ones((1, 5))


def of(values, **hyper):
    return losses.value_clip(values, OLD, RETURNS, MASK, **hyper)


def test_by_hand():
    # moved by more than 0.2 towards the return: the loss of the border, no gradient; away from it: as it is
    loss, pull = jax.vjp(of, VALUES)
    np.testing.assert_allclose(loss, np.array([[0.8**2, 1.5**2, 1.5**2, 0.9**2, 0.0]]) / 2, rtol=1e-6)
    np.testing.assert_allclose(pull(MASK)[0], [[0.0, 1.5, -1.5, -0.9, 0.0]], rtol=1e-6)


def test_without_a_clip():
    loss, pull = jax.vjp(lambda values: of(values, clip=None), VALUES)
    np.testing.assert_allclose(loss, (VALUES - RETURNS) ** 2 / 2, rtol=1e-6)
    np.testing.assert_allclose(pull(MASK)[0], VALUES - RETURNS, rtol=1e-6)


def test_a_clip_of_0_is_refused():
    with pytest.raises(ValueError, match=r"value_clip: clip=0; expected clip > 0"):
        of(VALUES, clip=0.0)


@pytest.mark.parametrize("clip", [0.2, None])
def test_old_values_and_returns_are_constants(clip):
    def loss(old_values, returns):
        return jnp.sum(losses.value_clip(VALUES, old_values, returns, MASK, clip=clip))

    for gradient in jax.grad(loss, (0, 1))(OLD, RETURNS):
        np.testing.assert_array_equal(gradient, np.zeros((1, 5)))


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "value_clip": Row(
            losses.value_clip,
            tokenwise(losses.value_clip, "values", "old_values", "returns"),
            references.value_clip,
            {"values": LOGP, "old_values": CONSTANT, "returns": CONSTANT},
            {"clip": 0.5},
        ),
    }
