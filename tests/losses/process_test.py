"""Process reward models: only the last tokens of steps count, labels may be soft."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, probability, real, tokenwise
from references import process as references

from alignax import losses, reduce


def test_two_classes_are_one_logit():
    wrong, right = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 0.5, -0.5]])
    labels, mask = jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[1, 0, 1]])
    loss = losses.process_reward(right - wrong, labels, mask)
    classes = jax.nn.log_softmax(jnp.stack([wrong, right], axis=-1))
    picked = jnp.take_along_axis(classes, labels.astype(int)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(loss, jnp.where(mask != 0, -picked, 0.0), rtol=1e-6)
    np.testing.assert_allclose(reduce.token_mean(loss, mask).value(), -(picked[0, 0] + picked[0, 2]) / 2, rtol=1e-6)


def test_labels_are_constants_and_probabilities_where_there_is_a_step():
    logits, mask = jnp.array([[1.0, 2.0]]), jnp.array([[1, 0]])
    slope = jax.grad(lambda y: jnp.sum(losses.process_reward(logits, y, mask)))(jnp.array([[0.3, 0.7]]))
    np.testing.assert_array_equal(slope, [[0.0, 0.0]])
    losses.process_reward(logits, jnp.array([[1.0, -100.0]]), mask)  # what is not a step may hold anything
    with pytest.raises(ValueError, match="process_reward: labels=-1; expected 0 <= labels <= 1"):
        losses.process_reward(logits, jnp.array([[-1.0, 0.0]]), mask)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "process_reward": Row(
            losses.process_reward,
            tokenwise(losses.process_reward, "logits", "labels"),
            references.process_reward,
            {"logits": Input(differentiable=True, make=real), "labels": Input(make=probability)},
        ),
    }
