"""Supervised objectives: what label smoothing, DFT and the z-loss do to a softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import LOGP, Input, Properties, Row, real, tokenwise
from references import supervised as references

from alignax import losses

LOGITS = jnp.array([2.0, 0.5, -1.0, 0.0])


def of_token(logits, token=1):
    """What the losses read from logits, as rows of one token."""
    logp = jax.nn.log_softmax(logits)
    return [x[None, None] for x in (logp[token], jnp.mean(logp), jax.nn.logsumexp(logits))]


def slope(loss):
    """The gradient of a loss of one token by the logits."""
    return jax.jit(jax.grad(lambda logits: loss(*of_token(logits))[0, 0]))(LOGITS)


def test_label_smoothing_pulls_towards_the_smoothed_target():
    p, target = jax.nn.softmax(LOGITS), 0.2 / 4 + 0.8 * np.eye(4)[1]
    smoothed = slope(
        lambda logp, mean, _: losses.smoothed_cross_entropy(logp, mean, jnp.ones((1, 1)), label_smoothing=0.2)
    )
    np.testing.assert_allclose(smoothed, p - target, rtol=1e-5, atol=1e-6)


def test_no_label_smoothing_is_the_cross_entropy():
    logp, mean, _ = of_token(LOGITS)
    mask = jnp.ones((1, 1))
    off = losses.smoothed_cross_entropy(logp, mean, mask, label_smoothing=0.0)
    np.testing.assert_array_equal(off, losses.cross_entropy(logp, mask))
    impossible = losses.smoothed_cross_entropy(logp, jnp.full((1, 1), -jnp.inf), mask, label_smoothing=0.0)
    np.testing.assert_array_equal(impossible, off)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.5, float("nan"), jnp.float32(2)])
def test_label_smoothing_out_of_range_is_refused(label_smoothing):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"label_smoothing=.*expected 0 <= label_smoothing <= 1"):
        losses.smoothed_cross_entropy(x, x, x, label_smoothing=label_smoothing)


def test_a_known_number_is_known_inside_jit_too():
    x, known = jnp.zeros((1, 1)), jnp.float32(0.3)
    jax.jit(lambda x: losses.smoothed_cross_entropy(x, x, x, label_smoothing=known))(x)


def test_dft_weighs_the_cross_entropy_by_the_probability():
    weighted = slope(lambda logp, *_: losses.dft(logp, jnp.ones((1, 1))))
    p = jax.nn.softmax(LOGITS)
    np.testing.assert_allclose(weighted, p[1] * (p - jnp.eye(4)[1]), rtol=1e-5, atol=1e-7)


def test_the_cross_entropy_of_an_impossible_token_is_finite():
    value, slope = jax.value_and_grad(lambda x: losses.cross_entropy(x, x == x)[0, 0])(jnp.full((1, 1), -jnp.inf))
    assert value == 1e4 and slope == 0


def test_dft_of_an_impossible_token_is_nothing():
    impossible = jnp.full((1, 1), -jnp.inf)
    value, slope = jax.value_and_grad(lambda x: losses.dft(x, jnp.ones((1, 1)))[0, 0])(impossible)
    assert value == 0 and slope == 0


def test_the_z_loss_moves_the_normaliser_only():
    pulled = slope(lambda *x: losses.z_loss(x[2], jnp.ones((1, 1))))
    np.testing.assert_allclose(pulled, 2 * jax.nn.logsumexp(LOGITS) * jax.nn.softmax(LOGITS), rtol=1e-5)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "cross_entropy": Row(
            losses.cross_entropy,
            tokenwise(losses.cross_entropy, "logp"),
            references.cross_entropy,
            {"logp": LOGP},
        ),
        "smoothed_cross_entropy": Row(
            losses.smoothed_cross_entropy,
            tokenwise(losses.smoothed_cross_entropy, "logp", "mean_logp"),
            references.smoothed_cross_entropy,
            {"logp": LOGP, "mean_logp": LOGP},
            {"label_smoothing": 0.3},
        ),
        "dft": Row(
            losses.dft,
            tokenwise(losses.dft, "logp"),
            references.dft,
            {"logp": LOGP},
            gradient_of=references.dft_potential,
        ),
        "z_loss": Row(
            losses.z_loss,
            tokenwise(losses.z_loss, "log_normalizer"),
            references.z_loss,
            {"log_normalizer": Input(differentiable=True, make=real)},
        ),
    }
