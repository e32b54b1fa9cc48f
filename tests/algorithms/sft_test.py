"""Supervised fine-tuning: what the loss reads beside log-probabilities, and the z-loss, from whole distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems, tiny

from alignax import losses, train
from alignax.algorithms import sft

BATCH = problems()["sft"].batch


@functools.cache
def softmax():
    """Log-probabilities of the whole vocabulary and log-normalisers, before every token."""
    model, params = tiny()
    states = jax.jit(model.hidden)(params, BATCH.tokens, BATCH.segments).states
    logits = np.roll(np.asarray(jax.jit(model.logits)(params, states), np.float64), 1, axis=1)
    normaliser = np.log(np.exp(logits).sum(-1))
    return logits - normaliser[..., None], normaliser


def mean(x):
    weights = BATCH.mask * BATCH.weights[:, None]
    return (weights * x).sum() / weights.sum()


def terms(hyper, **options):
    loss_fn = jax.jit(sft.make_loss(tiny()[0], **options))
    found = loss_fn(tiny()[1], jax.tree.map(jnp.asarray, BATCH), None, hyper)[0]
    return {name: term.weight for name, term in found.items()}, train.merge([{n: t.mean for n, t in found.items()}])


def test_label_smoothing_and_the_z_loss_read_the_whole_vocabulary():
    logp, normaliser = softmax()
    token = np.take_along_axis(logp, BATCH.tokens[..., None], axis=-1)[..., 0]
    smooth, hyper = losses.smoothed_cross_entropy, {"label_smoothing": 0.2, "z_loss_weight": 0.5}
    weights, values = terms(hyper, loss=smooth, z_loss_weight=1e-4)
    assert weights == {"nll": 1.0, "z_loss": 0.5}
    np.testing.assert_allclose(values["nll"], mean(-0.8 * token - 0.2 * logp.mean(-1)), rtol=1e-5)
    np.testing.assert_allclose(values["z_loss"], mean(normaliser**2), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.dft])
def test_losses_of_log_probabilities_alone(loss):
    token = np.take_along_axis(softmax()[0], BATCH.tokens[..., None], axis=-1)[..., 0]
    weights, values = terms({}, loss=loss)
    expected = -token if loss is losses.cross_entropy else -np.exp(token) * token
    assert weights == {"nll": 1.0}
    np.testing.assert_allclose(values["nll"], mean(expected), rtol=1e-5)
