"""What is particular to losses that are told a margin or rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import PAIR, Input, Properties, Row, pairwise, real
from references import margins as references
from vectors.common import response

from alignax import losses

NUMBER = Input("B", None, make=real)
REWARDS = {"chosen_reward": NUMBER, "rejected_reward": NUMBER}


def two(gap, /, **extra):
    """One pair, whose D is this; extra: name -> (number of the chosen side, number of the rejected one)."""
    sides = ({name: [x[i]] for name, x in extra.items()} for i in range(2))
    return [response([total], [0.0], **side) for total, side in zip((gap - 3.0, -3.0), sides, strict=True)]


def test_a_margin_of_0_is_dpo_and_a_larger_one_pushes_harder():
    chosen, rejected = two(1.5, margin=(0.0, 0.0))
    np.testing.assert_allclose(losses.odpo(chosen, rejected), losses.dpo(chosen, rejected), rtol=1e-6)

    def gradient(margin):
        chosen, rejected = two(1.5, margin=(margin, 0.0))
        return jax.grad(lambda x: losses.odpo(chosen._replace(logp=x), rejected).sum())(chosen.logp)[0, 0]

    assert gradient(2.0) < gradient(1.0) < gradient(0.0) < 0


@pytest.mark.parametrize("loss", [losses.rpo_backward_kl, losses.rpo_forward_kl, losses.rpo_squared])
def test_rewards_are_met_not_exceeded(loss):
    """0, and flat, where beta D is the gap of the rewards; else positive and back towards it."""
    rewards = {"reward": (0.7, 0.2)}

    def at(margin):
        chosen, rejected = two(margin, **rewards)
        return jax.value_and_grad(lambda x: loss(chosen._replace(logp=x), rejected, beta=0.5, eta=2.0).sum())(
            chosen.logp
        )

    value, gradient = at(2.0)  # 0.5 x 2 = 2 (0.7 - 0.2)
    np.testing.assert_allclose([value, gradient[0, 0]], 0.0, atol=1e-6)
    (above, down), (below, up) = at(3.0), at(1.0)
    assert above > 0 < below and up[0, 0] < 0 < down[0, 0]


def test_only_gaps_of_rewards_matter():
    (chosen, rejected), (higher, high) = two(1.0, reward=(0.5, 0.25)), two(1.0, reward=(4.5, 4.25))
    for loss in (losses.rpo_backward_kl, losses.rpo_forward_kl, losses.rpo_squared):
        np.testing.assert_array_equal(loss(higher, high), loss(chosen, rejected))


def test_squared_distance_to_one_half_is_ipo():
    chosen, rejected = two(1.0, reward=(0.5, 0.0))
    np.testing.assert_allclose(
        losses.rpo_squared(chosen, rejected, beta=0.2), 0.04 * losses.ipo(chosen, rejected, beta=0.2), rtol=1e-5
    )


@pytest.mark.parametrize("loss", [losses.odpo, losses.rpo_backward_kl, losses.rpo_forward_kl, losses.rpo_squared])
def test_what_is_given_is_a_constant_and_its_absence_is_named(loss):
    (name,) = losses.needed(loss)
    chosen, rejected = two(1.0, **{name: (0.5, 0.25)})
    gradient = jax.grad(lambda x: loss(chosen._replace(extra={name: x}), rejected).sum())(jnp.array([0.5]))
    np.testing.assert_array_equal(gradient, 0.0)
    with pytest.raises(ValueError, match=f"{loss.__name__}.*'{name}'"):
        loss(*two(1.0))
    with pytest.raises(AssertionError, match="shape"):  # it would be spread over the pairs
        loss(*two(1.0, **{name: ([0.5], [0.25])}))
    with pytest.raises(ValueError, match=f"{loss.__name__}: beta=0; expected beta > 0"):
        loss(chosen, rejected, beta=0.0)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "odpo": Row(
            losses.odpo,
            pairwise(losses.odpo, "margin"),
            references.odpo,
            PAIR | {"chosen_margin": NUMBER},
            {"beta": 0.5},
        ),
        **{
            loss.__name__: Row(
                loss, pairwise(loss, "reward"), reference, PAIR | REWARDS, {"beta": 0.3, "eta": 2.0}, rtol=1e-5
            )
            for loss, reference in (
                (losses.rpo_backward_kl, references.rpo_backward_kl),
                (losses.rpo_forward_kl, references.rpo_forward_kl),
                (losses.rpo_squared, references.rpo_squared),
            )
        },
    }
