"""GRPO's options against the arrays they are made of: corrections, an unbiased KL, an entropy bonus, rows left out."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LENGTH, ROWS, Problem, assert_same, on_one_device, problems, small, three_updates
from references.toys import chain

from alignax import corrections, losses, reduce
from alignax.algorithms import grpo
from alignax.logprobs import score

POLICY_LOSSES = (
    *("reinforce", "reinforce_is_token", "reinforce_is_sequence", "ppo_clip", "ppo_penalty", "ppo_hybrid", "cispo"),
    *("cispo_range", "sapo", "rloo", "gspo", "gspo_token", "luspo", "gmpo", "vespo"),
)
HYPER = {
    "kl_weight": 0.1,
    "entropy_weight": 0.05,
    "clip_low": 0.3,
    "correction_cap": 1.1,
    "off_policy_threshold": 0.05,
    "temperature": 0.8,
}
EVERYTHING = {
    "correction": corrections.truncated_is_token,
    "unbiased_kl": True,
    "entropy_weight": 0.0,
    "off_policy_threshold": 1.0,
    "mean": reduce.token_mean,
}


def batch():
    """The rollout of `problems`, and what a sampler said that is not quite the trainer."""
    rollout = problems(small)["grpo"].batch
    noise = np.random.default_rng(4).normal(size=rollout.mask.shape)
    return rollout._replace(rollout_logp=(rollout.old_logp + 0.2 * noise).astype(np.float32))


def problem(hyper=HYPER, **options):
    return Problem(partial(grpo.make_loss, **options), batch(), problems(small)["grpo"].frozen, hyper, small)


@pytest.fixture(scope="module")
def run():
    return on_one_device()


@pytest.fixture(scope="module")
def expected(run):
    return three_updates(problem(**EVERYTHING), run=run)


def terms(rollout, hyper=HYPER, **options):
    """The terms as means, and the metrics, by the small model."""
    model, params = small()
    loss_fn = grpo.make_loss(model, **options)

    @jax.jit
    def run(params, rollout, frozen, hyper):
        found, metrics = loss_fn(params, rollout, frozen, hyper)
        return {name: (term.weight, term.mean.value()) for name, term in found.items()}, values(metrics)

    return jax.tree.map(np.asarray, run(params, rollout, problems(small)["grpo"].frozen, hyper))


def values(metrics):
    return {name: metric.value() for name, metric in metrics.items()}


def test_the_terms_are_made_of_the_public_parts():
    rollout = jax.tree.map(jnp.asarray, batch())
    model, params = small()
    found, metrics = terms(rollout, **EVERYTHING)

    @jax.jit
    def parts(params, reference, rollout):
        mask, weights = rollout.mask & (rollout.weights > 0)[:, None], rollout.weights
        rows = (rollout.tokens, rollout.segments)
        scores = score(model, params, *rows, mask=mask, temperature=0.8, want=("entropy",))
        ref_logp = score(model, reference, *rows, mask=mask, temperature=0.8).logp
        advantages = jnp.broadcast_to(rollout.advantages[:, None], mask.shape)
        factor = corrections.truncated_is_token(rollout.old_logp, rollout.rollout_logp, mask, cap=1.1)
        kept = corrections.off_policy_mask(scores.logp, rollout.rollout_logp, advantages, mask, threshold=0.05)
        policy = losses.ppo_clip(scores.logp, rollout.old_logp, advantages, mask, clip_low=0.3) * factor * kept[:, None]
        kl = losses.k3(scores.logp, ref_logp, mask) * losses.importance_ratio(scores.logp, rollout.old_logp, mask)
        per_token = {"policy": policy, "kl": kl, "entropy": scores.entropy}
        means = {name: reduce.token_mean(x, mask, weights).value() for name, x in per_token.items()}
        measured = values(corrections.mismatch_metrics(rollout.old_logp, rollout.rollout_logp, mask, weights))
        return means, measured, kept, reduce.batch_mean(kept, weights).value()

    frozen = problems(small)["grpo"].frozen
    means, measured, kept, kept_rows = jax.tree.map(np.asarray, parts(params, frozen["reference"], rollout))
    assert 0 < np.sum(kept) < ROWS
    for name, weight in (("policy", 1.0), ("kl", 0.1), ("entropy", -0.05)):
        np.testing.assert_allclose(found[name], (weight, means[name]), rtol=2e-5, atol=1e-6, err_msg=name)
    assert len(measured) > 10
    for name, value in measured.items():
        np.testing.assert_allclose(metrics[f"sampling/{name}"], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(metrics["sampling/kept_rows"], kept_rows, rtol=1e-6)


def test_what_is_off_changes_nothing():
    plain, _ = terms(problems(small)["grpo"].batch, {}, kl_weight=0.1)
    off = {"correction": corrections.token_ratio, "entropy_weight": 0.0, "off_policy_threshold": 1e9}
    rollout = batch()
    found, metrics = terms(rollout._replace(rollout_logp=rollout.old_logp), {}, kl_weight=0.1, **off)
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    assert metrics["sampling/kept_rows"] == 1
    assert metrics["sampling/is_ratio_max"] == 1


def test_a_threshold_without_a_sampler_looks_at_the_old_policy():
    rollout = batch()._replace(rollout_logp=None)
    found, metrics = terms(rollout, {}, off_policy_threshold=0.0)
    assert set(metrics) >= {"sampling/kept_rows"} and "sampling/kl" not in metrics
    assert 0 < metrics["sampling/kept_rows"] < 1
    assert found["policy"][1] != terms(rollout, {})[0]["policy"][1]


def test_microbatches_and_padding(expected):
    def longer(x):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 5)]) if x.shape[-1] == LENGTH else x

    padded = jax.tree.map(longer, batch())
    assert_same(three_updates(problem(**EVERYTHING), batch=padded, microbatches=4), expected)


def test_what_the_sampler_said_of_other_tokens_does_not_matter(expected, run):
    rollout = batch()
    garbage = {name: np.where(rollout.mask, getattr(rollout, name), np.nan) for name in ("rollout_logp", "old_logp")}
    for array in garbage.values():
        array[2] = np.nan  # the filler row
    garbage = {name: array.astype(np.float32) for name, array in garbage.items()}
    assert_same(three_updates(problem(**EVERYTHING), run=run, batch=rollout._replace(**garbage)), expected)


def test_nothing_recompiles_when_a_number_changes(expected, run):
    del expected  # compiled
    changed = {name: 1.5 * value for name, value in HYPER.items()}
    three_updates(problem(changed, **EVERYTHING), run=run)
    assert len(run.traces) == 1


@functools.cache
def on_policy_gradients():
    """Of a Markov chain's table by every policy loss, and REINFORCE's when advantages weigh rows by their lengths."""
    model, rng = chain(), np.random.default_rng(0)
    tokens, mask = rng.integers(0, 5, (6, 8)), (np.arange(8) >= 2) & (np.arange(8) < rng.integers(4, 9, (6, 1)))
    rollout = grpo.Batch(*map(jnp.asarray, (tokens, np.ones((6, 8), np.int32), mask, rng.normal(size=6))))
    lengths = jnp.asarray(mask.sum(axis=1))
    weighted = rollout._replace(advantages=rollout.advantages * lengths)

    def gradient(policy_loss, rollout):
        loss_fn = grpo.make_loss(model, policy_loss=policy_loss, kl=None, mean=reduce.token_mean)
        return jax.grad(lambda params: loss_fn(params, rollout, None, {})[0]["policy"].mean.value())(table)

    table = model.init(jax.random.key(0))

    @jax.jit
    def compute():
        found = {name: gradient(getattr(losses, name), rollout) for name in POLICY_LOSSES}
        return found | {"weighted": gradient(losses.reinforce, weighted)}

    return jax.tree.map(np.asarray, compute())


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_any_policy_loss_drops_in(name):
    """On-policy all have REINFORCE's gradient; where a row's sum stands on each of its tokens, length times that."""
    expected = on_policy_gradients()["weighted" if name in {"rloo", "luspo"} else "reinforce"]
    np.testing.assert_allclose(on_policy_gradients()[name], expected, rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(expected)) > 0.01


def test_a_correction_of_what_nobody_reported_is_refused():
    model, params = small()
    loss_fn = grpo.make_loss(model, kl=None, correction=corrections.icepop)
    with pytest.raises(ValueError, match=r"the batch has no rollout_logp; expected one for the correction icepop"):
        jax.eval_shape(loss_fn, params, problems(small)["grpo"].batch, None, {})


@pytest.mark.parametrize(
    "kl, unbiased, message",
    [
        (losses.k1, False, "kl=k1 has an expected gradient of 0"),
        (losses.absolute, True, "kl=absolute is no KL"),
        (losses.k3_forward, False, "kl=k3_forward estimates from samples of the reference"),
        (losses.k2, True, "kl=k2 has its gradient without the ratio"),
    ],
)
def test_estimators_that_hold_no_policy_are_refused(kl, unbiased, message):
    with pytest.raises(ValueError, match=message):
        grpo.make_loss(small()[0], kl=kl, unbiased_kl=unbiased)
    grpo.make_loss(small()[0], kl=losses.k1, unbiased_kl=True)
