"""What is particular to policy losses of whole responses: closed forms, what is a constant, what equals what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policies import POLICY, fixed, sample
from properties import Properties, Row, tokenwise
from references import sequence_policy as references

from alignax import losses, reduce

ROW_LOSSES = ("rloo", "reinforce_is_sequence", "gspo", "gspo_token", "luspo", "gmpo", "vespo")
OLD = np.float32([[-1.0, -0.5, -2.0, -0.3], [-0.7, -1.2, -0.4, -9.0], [-1.0, -1.0, -1.0, -1.0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
LENGTHS = np.array([[4], [3], [1]])


def row(name, hyper, frozen=False):
    loss, loop = getattr(losses, name), getattr(references, name)
    return Row(loss, tokenwise(loss, *POLICY), loop, POLICY, hyper, fixed(loop) if frozen else None)


@functools.cache
def compiled(name, mean):
    """Gradient of the mean loss by the first of (logp, old_logp, advantages, mask)."""
    loss = getattr(losses, name)
    return jax.jit(jax.grad(lambda *x, **hyper: mean(loss(*x, **hyper), x[-1]).value()))


def gradient(name, logp, advantages, mean=reduce.sequence_mean, **hyper):
    """Of the mean loss, by logp, at OLD."""
    return compiled(name, mean)(np.float32(logp), OLD, np.float32(advantages), MASK, **hyper)


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_old_logp_and_advantages_are_constants(name):
    loss = getattr(losses, name)
    gradients = jax.jit(jax.grad(lambda *x: jnp.sum(loss(*x)), (1, 2)))(OLD + np.float32(0.01), OLD, OLD, MASK)
    for x in gradients:
        np.testing.assert_array_equal(x, np.zeros_like(OLD))


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_on_policy_the_gradient_is_that_of_reinforce(name):
    """Of a response: -A / length on each token where the ratio is an average, else -A; the mean is over two rows."""
    advantages = np.broadcast_to([[1.5], [-0.5], [7.0]], OLD.shape)
    per_token = name in {"gspo", "gspo_token", "gmpo"}
    sums = reduce.sequence_sum if name in {"reinforce_is_sequence", "vespo"} else reduce.sequence_mean
    expected = -advantages / np.where(per_token, LENGTHS, 1.0) / 2 * (np.asarray(MASK) > 0)
    np.testing.assert_allclose(gradient(name, OLD, advantages, sums), expected, rtol=1e-5)


def closed_forms(p, s, a):
    """By hand, d loss / d logp of a token, of the mean over rows: p the product of a row's ratios, s their mean."""
    near = np.where(a > 0, s < 1.2, s > 0.8)
    power, decay = np.where(a >= 0, 2, 3), np.where(a >= 0, 3, 2)
    return {
        "rloo": -a * p * np.where(a > 0, p < 1.2, p > 0.8),
        "reinforce_is_sequence": -a * np.minimum(p, 2),
        "gspo": -a * s / LENGTHS * near,
        "gspo_token": -a * s / LENGTHS * near,
        "luspo": -a * s * near,
        "gmpo": -a * s / LENGTHS,  # every token of these rows is inside
        "vespo": -a * p**power * np.exp(decay * (1 - p)),
    }


@pytest.mark.parametrize("name", ROW_LOSSES)
@pytest.mark.parametrize("moved", [(0.1, -0.1), (-0.1, 0.1), (0.3, -0.3), (-0.3, 0.3)])
def test_gradients_are_the_closed_forms(name, moved):
    moved = np.array([*moved, 0.0])[:, None]
    a, p, s = np.array([[1.5], [-0.5], [0.0]]), np.exp(moved * LENGTHS), np.exp(moved)
    hyper = {"clip_low": 0.2, "clip_high": 0.2} if name in {"rloo", "gspo", "gspo_token", "luspo"} else {}
    sums = reduce.sequence_sum if name in {"reinforce_is_sequence", "vespo"} else reduce.sequence_mean
    found = gradient(name, OLD + moved, np.broadcast_to(a, OLD.shape), sums, **hyper)
    np.testing.assert_allclose(found, closed_forms(p, s, a)[name] / 2 * (np.asarray(MASK) > 0), rtol=2e-5, atol=1e-7)


def test_gspo_token_is_gspo_where_the_advantage_is_the_rows():
    x = sample(seed=2, scale=0.3)
    x["advantages"] = np.broadcast_to(x["advantages"][:, :1], x["logp"].shape)

    @jax.jit
    def of_both(x):
        def mean(logp, loss):
            per_token = loss(logp, x["old_logp"], x["advantages"], x["mask"], clip_low=0.2, clip_high=0.2)
            return reduce.sequence_mean(per_token, x["mask"]).value()

        return [jax.value_and_grad(mean)(x["logp"], loss) for loss in (losses.gspo_token, losses.gspo)]

    of_token, of_row = jax.tree.map(np.asarray, of_both(x))
    for found, expected in zip(of_token, of_row, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert np.max(np.abs(of_row[1])) > 0.01


def test_luspo_is_gspo_summed_over_rows():
    x = sample(seed=2)
    eps = {"clip_low": 0.1, "clip_high": 0.3}

    @jax.jit
    def run(*arguments):
        found = reduce.sequence_mean(losses.luspo(*arguments, **eps), arguments[-1])
        expected = reduce.sequence_sum(losses.gspo(*arguments, **eps), arguments[-1])
        return found.value(), expected.value()

    found, expected = run(*(x[name] for name in (*POLICY, "mask")))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_gmpo_clips_tokens_and_only_where_it_would_gain():
    moved, one = np.float32([[0.6, -0.6, 0.1, 0.0]]), np.ones((1, 4), np.float32)
    slope = jax.jit(jax.grad(lambda *x: jnp.sum(losses.gmpo(*x))))
    for sign, counted in ((1, [0, 1, 1, 1]), (-1, [1, 0, 1, 1])):
        np.testing.assert_array_equal(np.asarray(slope(moved, 0 * one, sign * one, one)) != 0, [counted])


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_long_rows_do_not_overflow(name):
    """400 tokens a nat apart each: e^400 is no float32."""
    one = np.ones((2, 400), np.float32)
    run = jax.jit(jax.value_and_grad(lambda *x: jnp.sum(getattr(losses, name)(*x))))
    for moved in (1, -1, 300):
        value, found = run(moved * one, 0 * one, one * np.float32([[1], [-1]]), one)
        assert np.isfinite(value) and np.all(np.isfinite(found))


@pytest.mark.parametrize("name, hyper", [("gmpo", {"clip_low": 0.0}), ("reinforce_is_sequence", {"cap": -1.0})])
def test_hyperparameters_out_of_range_are_refused(name, hyper):
    with pytest.raises(ValueError, match=rf"{name}: .*expected .* > 0"):
        getattr(losses, name)(*map(jnp.asarray, (OLD, OLD, OLD, MASK)), **hyper)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "rloo": row("rloo", {"clip_low": 0.3, "clip_high": 0.5}),
        "reinforce_is_sequence": row("reinforce_is_sequence", {"cap": 1.3}, frozen=True),
        "gspo": row("gspo", {"clip_low": 0.3, "clip_high": 0.5}),
        "gspo_token": row("gspo_token", {"clip_low": 0.3, "clip_high": 0.5}, frozen=True),
        "luspo": row("luspo", {"clip_low": 0.3, "clip_high": 0.5}),
        "gmpo": row("gmpo", {"clip_low": 0.3, "clip_high": 0.7}),
        "vespo": row(
            "vespo",
            {"power_positive": 1.5, "decay_positive": 1.0, "power_negative": 1.2, "decay_negative": 0.7},
            frozen=True,
        ),
    }
