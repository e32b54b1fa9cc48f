"""Off-policy corrections: weights are constants, 1 where nothing differs; metrics add up over parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, device, make, real, tokenwise
from references import corrections as references

from alignax import corrections, losses, reduce
from alignax.types import Max, Mean

PAIR = {"old_logp": Input(), "rollout_logp": Input()}
WEIGHTS = {
    "token_ratio": {},
    "sequence_ratio": {},
    "geometric_ratio": {},
    "truncated_is_token": {"cap": 1.3},
    "truncated_is_sequence": {"cap": 1.7},
    "truncated_is_geometric": {"cap": 1.1},
    "masked_is_token": {"low": 0.4, "high": 1.9},
    "masked_is_sequence": {"low": 0.3, "high": 2.5},
    "icepop": {"low": 0.6, "high": 1.8},
    "geometric_rejection": {"low": 0.5, "high": 1.6},
}


def row(name, hyper):
    weigh = getattr(corrections, name)
    return Row(weigh, tokenwise(weigh, *PAIR), getattr(references, name), PAIR, hyper)


def sample(**options):
    """old_logp, rollout_logp, mask."""
    x = device(make(row("token_ratio", {}), **options))
    return x["old_logp"], x["rollout_logp"], x["mask"]


@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_log_probabilities_weigh_1(name):
    old_logp, _, mask = sample()
    impossible = old_logp.at[0].set(-jnp.inf)
    for logp in (old_logp, impossible):
        np.testing.assert_array_equal(getattr(corrections, name)(logp, logp, mask), mask.astype(jnp.float32))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_constants(name):
    old_logp, rollout_logp, mask = sample(scale=0.1)
    gradients = jax.grad(lambda *x: jnp.sum(getattr(corrections, name)(*x, mask)), (0, 1))(old_logp, rollout_logp)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, jnp.zeros_like(gradient))


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name.startswith("truncated")])
def test_a_cap_of_0_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: cap=0; expected cap > 0"):
        getattr(corrections, name)(*sample(), cap=0.0)


def test_a_weighted_loss_is_that_of_the_policy_that_sampled():
    """Samples of one policy, weighted, have the expectation of another: exact, over all tokens of a vocabulary."""
    sampled, old = (jax.nn.log_softmax(x) for x in jax.random.normal(jax.random.key(0), (2, 5)))
    reward, one = jnp.arange(5.0)[:, None], jnp.ones((5, 1))

    def gradient(weights, p):
        loss = lambda logits: losses.reinforce(jax.nn.log_softmax(logits)[:, None], one, reward, one)  # noqa: E731
        return jax.grad(lambda logits: jnp.sum(p[:, None] * weights * loss(logits)))(old)

    weights = corrections.truncated_is_token(old[:, None], sampled[:, None], one, cap=1e3)
    np.testing.assert_allclose(gradient(weights, jnp.exp(sampled)), gradient(one, jnp.exp(old)), rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(gradient(one, jnp.exp(sampled)) - gradient(one, jnp.exp(old)))) > 0.1


def test_normalised_weights_have_mean_1():
    weights = corrections.truncated_is_token(*sample())
    mask = sample()[-1]
    ours = corrections.normalised(weights, mask)
    np.testing.assert_allclose(reduce.token_mean(ours, mask).value(), 1.0, rtol=1e-6)
    mean = reduce.token_mean(weights, mask).value()
    parts = [corrections.normalised(weights[i::2], mask[i::2], mean=mean) for i in range(2)]
    np.testing.assert_allclose(jnp.concatenate(parts), jnp.concatenate([ours[::2], ours[1::2]]), rtol=1e-6)
    np.testing.assert_array_equal(corrections.normalised(0 * weights, mask), 0 * weights)


def test_off_policy_mask_keeps_good_rows_and_near_ones():
    logp, mask = jnp.full((5, 2), -1.0), jnp.ones((5, 2)).at[4].set(0)
    advantages = jnp.array([[1.0, 1.0], [0.5, -0.5], [-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0]])
    gone = jnp.array([[2.0, 2.0], [2.0, 2.0], [2.0, 2.0], [0.1, 0.3], [2.0, 2.0]])  # the last row is empty
    kept = corrections.off_policy_mask(logp, logp + gone, advantages, mask, threshold=0.25)
    np.testing.assert_array_equal(kept, [1, 1, 0, 1, 1])
    gradient = jax.grad(lambda x: jnp.sum(corrections.off_policy_mask(x, logp, advantages, mask, threshold=0.25)))(logp)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(logp))


def loop_metrics(old_logp, rollout_logp, mask, weights, cap):
    """One row after the other, those that weigh 0 left out, others by their weight."""
    sums = {}

    def add(name, x, weight):
        total, count = sums.get(name, (0.0, 0.0))
        sums[name] = total + weight * x, count + weight

    largest = {"logp_diff_max": 0.0, "is_ratio_max": 0.0}
    for old, rollout, chosen, weight in zip(old_logp, rollout_logp, mask, weights, strict=True):
        d = (old - rollout)[chosen].astype(np.float64)
        if not len(d) or weight == 0:
            continue
        for x in d:
            r = np.exp(x)
            add("kl", -x, weight)
            add("k3", r - 1 - x, weight)
            add("logp_diff_mean", abs(x), weight)
            add("is_ratio_mean", r, weight)
            add("is_ratio_square", r * r, weight)
            add("is_ratio_above_cap", float(r > cap), weight)
            add("chi2_token", r * r - 1, weight)
        add("chi2_sequence", np.exp(2 * d.sum()) - 1, weight)
        train, sampled = (np.exp(-x[chosen].mean(dtype=np.float64)) for x in (old, rollout))
        add("train_perplexity", train, weight)
        add("rollout_perplexity", sampled, weight)
        add("perplexity_ratio", train / sampled, weight)
        largest["logp_diff_max"] = max(largest["logp_diff_max"], abs(d).max())
        largest["is_ratio_max"] = max(largest["is_ratio_max"], np.exp(d.max()))
    return {name: total / count for name, (total, count) in sums.items()} | largest


def test_mismatch_metrics_equal_a_loop_and_add_up_over_parts():
    old_logp, rollout_logp, mask = sample(scale=0.7)
    weights = jnp.array([1.0, 1.0, 0.0, 0.5])
    rollout_logp = jnp.where(mask, rollout_logp, jnp.nan).at[2].set(jnp.nan)
    mask = mask.at[2].set(False)  # as `algorithms` blank a filler row
    found = corrections.mismatch_metrics(old_logp, rollout_logp, mask, weights, cap=1.2)
    expected = loop_metrics(*map(np.asarray, (old_logp, rollout_logp, mask, weights)), cap=1.2)
    assert found.keys() == expected.keys()
    parts = [corrections.mismatch_metrics(*(x[i : i + 1] for x in (old_logp, rollout_logp, mask, weights)), cap=1.2)
             for i in range(4)]  # fmt: skip
    for name, value in found.items():
        np.testing.assert_allclose(value.value(), expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
        if isinstance(value, Max):
            assert max(part[name].value() for part in parts) == value.value()
        else:
            together = Mean(*(jnp.sum(jnp.stack(x)) for x in zip(*(part[name] for part in parts), strict=True)))
            np.testing.assert_allclose(together.value(), value.value(), rtol=1e-5, atol=1e-6, err_msg=name)


def test_effective_sample_size():
    weights = np.array([1.0, 1.0, 2.0, 0.0])
    np.testing.assert_allclose(corrections.ess(weights.mean(), (weights**2).mean()), 16 / 6 / 4, rtol=1e-6)
    assert corrections.ess(1.0, 1.0) == 1 and corrections.ess(0.0, 0.0) == 0


@pytest.mark.parametrize("name", ["masked_is_token", "masked_is_sequence", "icepop", "geometric_rejection"])
def test_an_empty_range_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: low=2.0, high=1.5; expected low < high"):
        getattr(corrections, name)(*sample(), low=2.0, high=1.5)


class TestRows(Properties):
    rows = {name: row(name, hyper) for name, hyper in WEIGHTS.items()} | {
        "normalised": Row(
            corrections.normalised,
            tokenwise(corrections.normalised, "weights"),
            references.normalised,
            {"weights": Input(make=lambda rng, shape, scale: np.abs(real(rng, shape, scale)))},
            {"mean": 1.7},
            coupled=True,
        ),
        "off_policy_mask": Row(
            corrections.off_policy_mask,
            lambda x, threshold=0.2: corrections.off_policy_mask(
                x["logp"], x["rollout_logp"], x["advantages"], x["mask"], threshold=threshold
            ),
            lambda x, threshold=0.2: references.off_policy_mask(x, threshold),
            {"logp": Input(), "rollout_logp": Input(), "advantages": Input(make=real)},
            {"threshold": 0.3},
        ),
    }
