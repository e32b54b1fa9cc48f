"""What is particular to policy losses: closed forms, what is a constant, gradients at the borders, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import POLICY, fixed, sample
from properties import LOGP, Input, Properties, Row, device, real, tokenwise
from references import policy_gradient as references

from alignax import losses

A2C = {"logp": LOGP, "values": Input(differentiable=True, make=real), "returns": Input(make=real)}
A2C["entropy"] = Input(differentiable=True, make=real)
RATIO = {name: POLICY[name] for name in ("logp", "old_logp")}
CLIP = tokenwise(losses.ppo_clip, *POLICY)
# every loss of this signature whose ratio is a token's
TOKEN_LOSSES = (
    *("reinforce", "reinforce_is_token", "ppo_clip", "ppo_hybrid"),
    *("ppo_penalty", "cispo", "cispo_range", "sapo"),
)


def row(name, hyper, frozen=False):
    """A row of the loss `name`; frozen: its gradient is not that of its value, for a factor in it is a constant."""
    loss, loop = getattr(losses, name), getattr(references, name)
    return Row(loss, tokenwise(loss, *POLICY), loop, POLICY, hyper, fixed(loop) if frozen else None)


def test_ppo_clip_by_hand():
    # A > 0 beyond the range: value of the border, no gradient; A < 0 beyond it: clipped only from below
    ratio = np.float32([[1.4, 0.7, 1.4, 0.7, 1.0]])
    advantages = np.float32([[1.0, 1.0, -1.0, -1.0, 2.0]])
    zeros, ones = np.zeros((1, 5), np.float32), np.ones((1, 5), np.float32)

    @jax.jit
    def run(logp, *rest):
        value, pull = jax.vjp(lambda logp: losses.ppo_clip(logp, *rest), logp)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = run(np.log(ratio), zeros, advantages, ones)
    np.testing.assert_allclose(value, [[-1.2, -0.7, 1.4, 0.8, -2.0]], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0.0, -0.7, 1.4, 0.0, -2.0]], rtol=1e-6)


def gradient_by(name, argnums):
    """Of the sum of a loss of (logp, old_logp, advantages, mask), compiled."""
    return jax.jit(jax.grad(lambda *x: jnp.sum(getattr(losses, name)(*x)), argnums))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_old_logp_and_advantages_are_constants(name):
    x = np.float32([[-1.0, -2.0, -0.5]])
    gradients = gradient_by(name, (1, 2))(x, x - np.float32(0.1), x, np.ones_like(x))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_on_policy_the_gradient_is_that_of_reinforce(name):
    x = sample()
    gradient = gradient_by(name, 0)(x["logp"], x["logp"], x["advantages"], x["mask"])
    np.testing.assert_allclose(gradient, np.where(x["mask"], -x["advantages"], 0.0), rtol=1e-6)


def closed_forms(r, a):
    """By hand, for ratios r: d loss / d logp of a token; clip ranges of 0.2, caps as below."""
    s = {sign: 1 / (1 + np.exp(-tau * (r - 1))) for sign, tau in ((1, 1.0), (-1, 1.05))}
    gate = np.where(a > 0, 4 * s[1] * (1 - s[1]), 4 * s[-1] * (1 - s[-1]))
    unclipped = np.where(a > 0, r < 1.2, r > 0.8)
    return {
        "reinforce": -a,
        "reinforce_is_token": -np.minimum(r, 2) * a,
        "ppo_clip": -a * r * unclipped,
        "ppo_penalty": -a * r + r - 1,
        "ppo_hybrid": -a * r * unclipped + r - 1,
        "cispo": -np.minimum(r, 5) * a,
        "cispo_range": -np.clip(r, 0.8, 1.2) * a,
        "sapo": -a * gate * r,
    }


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_gradients_are_the_closed_forms(name):
    r = np.array([[0.3, 0.3, 0.9, 0.9, 1.1, 1.1, 1.5, 1.5, 3.0, 3.0, 9.0, 9.0]])
    a = np.where(np.arange(12) % 2, -0.7, 0.4)[None]
    old = np.full((1, 12), -3.0)
    arguments = (x.astype(np.float32) for x in (old + np.log(r), old, a, np.ones((1, 12))))
    gradient = gradient_by(name, 0)(*arguments)
    np.testing.assert_allclose(gradient, closed_forms(r, a)[name], rtol=1e-5, atol=3e-6)


def test_ppo_penalty_holds_the_old_policy():
    # A = 0: nothing but the penalty, whose minimum is the old policy; with its weight 0 nothing at all
    x, old = np.float32([[-1.0, -1.0, -1.0]]), jnp.array([[-1.5, -1.0, -0.5]])
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(losses.ppo_penalty(x, old, 0 * x, jnp.ones((1, 3)), kl_weight=w))))
    np.testing.assert_allclose(gradient(x, 2.0), 2 * np.expm1([[0.5, 0.0, -0.5]]), rtol=1e-6)
    np.testing.assert_array_equal(gradient(x, 0.0), np.zeros((1, 3)))


def test_a_dual_clip_is_a_cap_on_the_ratio():
    """TRL's `delta`, which caps the ratio of good tokens too: there the upper clip has come first."""
    x = sample(seed=3, scale=2.0, T=50)
    loss = losses.ppo_clip(*device([x[name] for name in (*POLICY, "mask")]), dual_clip=2.5)
    np.testing.assert_allclose(loss, references.ppo_delta(x, delta=2.5), rtol=2e-6, atol=2e-6)
    assert np.any(np.abs(loss - references.ppo_clip(x)) > 0.1)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_an_impossible_token_has_a_ratio_of_1_to_itself(name):
    x, one = np.full((1, 2), -np.inf, np.float32), np.ones((1, 2), np.float32)

    @jax.jit
    def run(x, one):
        loss = jax.value_and_grad(lambda x: jnp.sum(getattr(losses, name)(x, x, one, one)))(x)
        return loss, losses.importance_ratio(x, x, one)

    (value, gradient), ratio = jax.tree.map(np.asarray, run(x, one))
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(ratio, one)


def test_a2c_reaches_the_critic_by_its_error_alone():
    logp, values, returns, entropy = (np.float32([[x]]) for x in (-1.5, 0.25, 1.0, 0.9))
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(losses.a2c(*x, jnp.ones((1, 1)))), (0, 1, 2, 3)))(
        logp, values, returns, entropy
    )
    np.testing.assert_allclose(np.ravel(gradients), [-0.75, 0.5 * -0.75, 0.0, -0.01], rtol=1e-6)


@pytest.mark.parametrize(
    "name, hyper, expected",
    [
        ("ppo_clip", {"dual_clip": 1.0}, r"dual_clip=1; expected a number above 1"),
        ("ppo_clip", {"dual_clip": 0.5}, r"dual_clip=0.5; expected a number above 1"),
        ("cispo", {"ratio_max": 0.0}, r"ratio_max=0; expected ratio_max > 0"),
        ("sapo", {"tau_negative": -1.0}, r"tau_negative=-1; expected tau_negative > 0"),
        ("reinforce_is_token", {"cap": 0}, r"cap=0; expected cap > 0"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, hyper, expected):
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=expected):
        getattr(losses, name)(x, x, x, x, **hyper)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "importance_ratio": Row(
            losses.importance_ratio, tokenwise(losses.importance_ratio, *RATIO), references.importance_ratio, RATIO
        ),
        "reinforce": row("reinforce", {}),
        "reinforce_is_token": row("reinforce_is_token", {"cap": 1.3}, frozen=True),
        "ppo_clip": row("ppo_clip", {"clip_low": 0.1}),
        "ppo_clip_higher": row("ppo_clip", {"clip_low": 0.15, "clip_high": 0.28}),
        "ppo_dual_clip": row("ppo_clip", {"dual_clip": 1.5}),
        "ppo_penalty": row("ppo_penalty", {"kl_weight": 0.3}),
        "ppo_hybrid": row("ppo_hybrid", {"clip_low": 0.1, "clip_high": 0.3, "kl_weight": 0.4}),
        "cispo": row("cispo", {"ratio_max": 1.4, "ratio_min": 0.3}, frozen=True),
        "cispo_range": row("cispo_range", {"clip_low": 0.3, "clip_high": 0.4}, frozen=True),
        "sapo": row("sapo", {"tau_positive": 1.5, "tau_negative": 1.2}),
    }


class TestA2C(Properties):
    rows = {  # noqa: RUF012
        "a2c": Row(
            losses.a2c,
            tokenwise(losses.a2c, *A2C),
            references.a2c,
            A2C,
            {"value_weight": 0.7, "entropy_weight": 0.2},
            fixed(references.a2c, A2C),
        ),
    }
