"""What is particular to policy losses: outside vectors, gradients at the borders of the clip range, refusals."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import CONSTANT, LOGP, Input, Properties, Row, real, tokenwise
from references import policy_gradient as references

from alignax import losses, reduce

POLICY = {"logp": LOGP, "old_logp": CONSTANT, "advantages": Input(make=real)}
CLIP = tokenwise(losses.ppo_clip, *POLICY)
MEANS = {
    "token-mean": reduce.token_mean,
    "seq-mean-token-mean": reduce.sequence_mean,
    "seq-mean-token-sum": reduce.sequence_sum,
}


def vectors(shared, function):
    found = json.loads((shared / "spec" / "vectors_online.json").read_text())
    return [vector for vector in found if vector["function"] == function]


def arrays(x, *names):
    return [jnp.asarray(x[name], jnp.float32) for name in names]


def test_ppo_clip_by_hand():
    # A > 0 beyond the range: value of the border, no gradient; A < 0 beyond it: clipped only from below
    ratio = jnp.array([[1.4, 0.7, 1.4, 0.7, 1.0]])
    advantages = jnp.array([[1.0, 1.0, -1.0, -1.0, 2.0]])
    old, mask = jnp.zeros((1, 5)), jnp.ones((1, 5))

    def loss(logp):
        return losses.ppo_clip(logp, old, advantages, mask)

    np.testing.assert_allclose(loss(jnp.log(ratio)), [[-1.2, -0.7, 1.4, 0.8, -2.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(loss(x)))(jnp.log(ratio))
    np.testing.assert_allclose(gradient, [[0.0, -0.7, 1.4, 0.0, -2.0]], rtol=1e-6)


def test_old_logp_and_advantages_are_constants():
    x, mask = jnp.full((2, 3), -1.0), jnp.ones((2, 3))
    gradients = jax.grad(lambda old, a: jnp.sum(losses.ppo_clip(x, old, a, mask)), (0, 1))(x, x)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, jnp.zeros_like(x))


def test_ppo_penalty_holds_the_old_policy():
    # A = 0: nothing but the penalty, whose minimum is the old policy; with its weight 0 nothing at all
    x, mask = jnp.array([[-1.0, -1.0, -1.0]]), jnp.ones((1, 3))
    old = jnp.array([[-1.5, -1.0, -0.5]])
    gradient = jax.grad(lambda x, w: jnp.sum(losses.ppo_penalty(x, old, 0 * x, mask, kl_weight=w)))
    np.testing.assert_allclose(gradient(x, 2.0), 2 * np.expm1([[0.5, 0.0, -0.5]]), rtol=1e-6)
    np.testing.assert_array_equal(gradient(x, 0.0), np.zeros((1, 3)))


@pytest.mark.parametrize("dual_clip", [1.0, 0.5])
def test_dual_clip_out_of_range_is_refused(dual_clip):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="expected a number above 1"):
        losses.ppo_clip(x, x, x, x, dual_clip=dual_clip)


def test_grpo_vectors(shared):
    used = 0
    for vector in vectors(shared, "grpo_loss"):
        x, hyper, expected = vector["inputs"], vector["hyperparameters"], vector["expected"]
        if hyper.get("unbiased_kl"):
            continue
        mask, seq_adv = arrays(x, "mask", "seq_adv")
        logp = jnp.asarray(x["logp"], jnp.float32)
        old_logp = logp if x["old_logp"] is None else jnp.asarray(x["old_logp"], jnp.float32)
        ref_logp = logp if x["ref_logp"] is None else jnp.asarray(x["ref_logp"], jnp.float32)
        advantages = jnp.broadcast_to(seq_adv[:, None], mask.shape)
        means = MEANS | {"seq-sum-norm": partial(reduce.constant_mean, constant=hyper.get("norm_const"))}

        def loss(logp):
            policy = losses.ppo_clip(
                logp, old_logp, advantages, mask, clip_low=hyper["eps_low"], clip_high=hyper["eps_high"]
            )
            return means[hyper["agg"]](policy + hyper["beta"] * losses.k3(logp, ref_logp, mask), mask).value()

        value, grad = jax.value_and_grad(loss)(logp)
        np.testing.assert_allclose(value, expected["loss"], atol=2e-6, err_msg=vector["id"])
        np.testing.assert_allclose(grad, expected["grad_logp"], atol=2e-6, err_msg=vector["id"])
        used += 1
    assert used == 4


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "ppo_clip": Row(losses.ppo_clip, CLIP, references.ppo_clip, POLICY, {"clip_low": 0.1}),
        "ppo_clip_higher": Row(
            losses.ppo_clip, CLIP, references.ppo_clip, POLICY, {"clip_low": 0.15, "clip_high": 0.28}
        ),
        "ppo_dual_clip": Row(losses.ppo_clip, CLIP, references.ppo_clip, POLICY, {"dual_clip": 1.5}),
        "ppo_penalty": Row(
            losses.ppo_penalty,
            tokenwise(losses.ppo_penalty, *POLICY),
            references.ppo_penalty,
            POLICY,
            {"kl_weight": 0.3},
        ),
    }
