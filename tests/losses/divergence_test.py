"""What the KL estimators are for: their values and gradients in expectation, over a vocabulary small enough to sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import CONSTANT, LOGP, Input, Properties, Row, real, tokenwise
from references import divergence as references

from alignax import losses

SYMBOLS = 4
KL = {"logp": LOGP, "ref_logp": CONSTANT}
PLAIN = (losses.k1, losses.k2, losses.k3, losses.k3_capped, losses.k3_forward, losses.absolute)
ESTIMATORS = (*PLAIN, losses.k1_straight_through, losses.k3_straight_through)


def policies(seed):
    logits, ref_logits = np.random.default_rng(seed).normal(size=(2, SYMBOLS))
    p, q = (np.exp(x) / np.exp(x).sum() for x in (logits, ref_logits))
    return jnp.asarray(logits, jnp.float32), p, q


def kl(p, q):
    return np.sum(p * np.log(p / q))


def gradient_of_kl(p, q):
    """With respect to the logits of p: p_v (log p_v / q_v - KL)."""
    return p * (np.log(p / q) - kl(p, q))


def expectation(estimate, logits, weights, q):
    """The mean of an estimate over symbols drawn with these weights, and its gradient by the policy's logits."""
    return expectations(estimate)(logits, np.float32(weights), np.float32(np.log(q)))


@functools.cache
def expectations(estimate):
    @jax.jit
    @jax.value_and_grad
    def mean(logits, weights, ref_logp):
        return jnp.sum(weights[None] * estimate(jax.nn.log_softmax(logits)[None], ref_logp[None], jnp.ones((1, 4))))

    return mean


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "estimate, value, gradient",
    [
        (losses.k1, "reverse", None),
        (losses.k1_straight_through, "reverse", "reverse"),
        (losses.k2, None, "reverse"),
        (losses.k3, "reverse", "forward"),
        (losses.k3_straight_through, "reverse", "reverse"),
    ],
)
def test_expectations_under_the_policy(estimate, value, gradient, seed):
    logits, p, q = policies(seed)
    mean, slope = expectation(estimate, logits, p, q)
    if value == "reverse":
        np.testing.assert_allclose(mean, kl(p, q), rtol=1e-5, atol=1e-6)
    expected = {None: np.zeros(SYMBOLS), "reverse": gradient_of_kl(p, q), "forward": p - q}[gradient]
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1])
def test_expectations_under_the_reference(seed):
    logits, p, q = policies(seed)
    mean, slope = expectation(losses.k3_forward, logits, q, q)
    np.testing.assert_allclose(mean, kl(q, p), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, p - q, rtol=1e-5, atol=1e-6)


def test_full_kl_of_impossible_symbols():
    inf = np.inf
    logits = np.float32([[[0.0, -inf, 0.0], [0.0, 0.0, 0.0]]])
    ref_logits = np.float32([[[0.0, -inf, np.log(3.0)], [0.0, 0.0, -inf]]])

    @jax.jit
    def run(*arguments):
        value = losses.full_kl(*arguments)
        return value, jax.grad(lambda x: losses.full_kl(x, *arguments[1:])[0, 0])(arguments[0])

    value, gradient = jax.tree.map(np.asarray, run(logits, ref_logits, np.ones((1, 2), np.float32)))
    np.testing.assert_allclose(value, [[np.log(2 / np.sqrt(3)), np.inf]], rtol=1e-5)  # 1/2 log 2 + 1/2 log 2/3
    p, q = np.array([0.5, 0.5]), np.array([0.25, 0.75])
    np.testing.assert_allclose(gradient[0, 0, [0, 2]], gradient_of_kl(p, q), rtol=1e-5)
    assert np.all(np.isfinite(gradient[0, 0]))


def test_entropy_of_impossible_symbols_and_its_gradient():
    logits = np.float32([[[0.0, -np.inf, np.log(3.0)], [0.0, 0.0, 0.0]]])

    @jax.jit
    def run(logits):
        value, pull = jax.vjp(lambda x: losses.entropy(x, jnp.ones((1, 2))), logits)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = jax.tree.map(np.asarray, run(logits))
    p = np.array([0.25, 0.75])
    np.testing.assert_allclose(value, [[-np.sum(p * np.log(p)), np.log(3.0)]], rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0, [0, 2]], -p * (np.log(p) + value[0, 0]), rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and np.allclose(gradient[0, 1], 0, atol=1e-7)


def test_the_reference_of_an_estimator_is_a_constant():
    @jax.jit
    def gradients(x, ref_logp, mask):
        return [jax.grad(lambda ref, f=estimate: jnp.sum(f(x, ref, mask)))(ref_logp) for estimate in ESTIMATORS]

    x = np.float32([[-1.0, -2.0]])
    for gradient in gradients(x, x - np.float32(0.5), np.ones((1, 2), np.float32)):
        np.testing.assert_array_equal(gradient, np.zeros((1, 2)))


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_a_token_impossible_under_both_does_not_tell_them_apart(estimate):
    x, mask = np.full((1, 2), -np.inf, np.float32), np.ones((1, 2), np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(estimate(*x))))(x, x, mask)
    assert value == 0 and np.all(np.isfinite(gradient))


class TestRows(Properties):
    rows = {  # noqa: RUF012
        **{f.__name__: Row(f, tokenwise(f, "logp", "ref_logp"), getattr(references, f.__name__), KL) for f in PLAIN},
        "k3_capped_low": Row(
            losses.k3_capped, tokenwise(losses.k3_capped, "logp", "ref_logp"), references.k3_capped, KL, {"cap": 0.3}
        ),
        **{
            f.__name__: Row(f, tokenwise(f, "logp", "ref_logp"), value, KL, gradient_of=references.k2)
            for f, value in ((losses.k1_straight_through, references.k1), (losses.k3_straight_through, references.k3))
        },
        "entropy": Row(
            losses.entropy,
            tokenwise(losses.entropy, "logits"),
            references.entropy,
            {"logits": Input("B T V", differentiable=True, make=real)},
        ),
        "full_kl": Row(
            losses.full_kl,
            tokenwise(losses.full_kl, "logits", "ref_logits"),
            references.full_kl,
            {name: Input("B T V", differentiable=True, make=real) for name in ("logits", "ref_logits")},
        ),
    }
