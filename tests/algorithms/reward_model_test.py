"""Reward models: what is learned from a pair's two scores, in numpy from the formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems, scored, tiny

from alignax import train
from alignax.algorithms import reward_model

BATCH = problems()["reward_model"].batch
HYPER = {"centering_weight": 0.1}


@functools.cache
def value_and_gradient():
    """Compiles `run(params, batch, hyper) -> loss, terms and metrics, gradient of the head`."""
    model, _ = scored()
    loss_fn = reward_model.make_loss(model)

    @jax.jit
    def run(params, batch, hyper):
        def loss(head):
            terms, metrics = loss_fn(params | {"score": head}, batch, None, hyper)
            return sum(term.weight * term.mean.value() for term in terms.values()), (terms, metrics)

        (value, (terms, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(params["score"])
        report = train.merge([{name: term.mean for name, term in terms.items()} | dict(metrics)])
        return value, report, gradient

    return run


@functools.cache
def scores():
    """`[B, 2]`: what the head says of the state at the last token of every row."""
    model, params = scored()
    tokens, segments = (x.reshape(-1, x.shape[-1]) for x in (BATCH.tokens, BATCH.segments))
    states = jax.jit(lambda *x: model.hidden(*x).states)(params, tokens, segments)
    last = np.asarray(states, np.float64)[np.arange(len(tokens)), segments.sum(axis=1) - 1]
    return (last @ np.asarray(params["score"]["kernel"], np.float64)).reshape(-1, 2)


def mean(x, weights=BATCH.weights):
    return (weights * x).sum() / weights.sum()


def test_the_loss_is_that_of_the_scores():
    _, params = scored()
    chosen, rejected = scores().T
    d = chosen - rejected
    p, logit = BATCH.preference, d - BATCH.margin
    pairs = mean(-p * np.log(1 / (1 + np.exp(-logit))) - (1 - p) * np.log(1 / (1 + np.exp(logit))))
    centring = mean((chosen + rejected) ** 2)
    value, report, _ = value_and_gradient()(params, BATCH, HYPER)
    expected = {
        "pairs": pairs,
        "centering": centring,
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(d),
        "rewards/accuracies": mean(d > 0),
    }
    assert report.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(report[name], number, rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(value, pairs + 0.1 * centring, rtol=1e-5)


def test_centring_off_and_on_differ_by_its_term():
    _, params = scored()
    run = value_and_gradient()
    off, report, slope_off = run(params, BATCH, {"centering_weight": 0.0})
    on, report_on, slope_on = run(params, BATCH, {"centering_weight": 0.5})
    assert report == report_on
    np.testing.assert_allclose(off, report["pairs"], rtol=1e-6)
    np.testing.assert_allclose(on - off, 0.5 * mean(scores().sum(axis=1) ** 2), rtol=1e-4)
    # the score is linear in the head's kernel, so its gradient times the kernel is that of the loss along the scores
    kernel = params["score"]["kernel"]
    along = jnp.vdot(slope_on["kernel"] - slope_off["kernel"], kernel)
    np.testing.assert_allclose(along, 0.5 * mean(2 * scores().sum(axis=1) ** 2), rtol=1e-4)


def test_margin_and_preference_of_all_pairs_are_hyperparameters():
    model, params = scored()
    d = scores()[:, 0] - scores()[:, 1]
    plain = reward_model.Batch(jnp.asarray(BATCH.tokens), jnp.asarray(BATCH.segments))
    loss_fn = jax.jit(lambda hyper: reward_model.make_loss(model)(params, plain, None, hyper)[0]["pairs"].mean.value())
    smooth = 0.9 * np.log1p(np.exp(1 - d)) + 0.1 * np.log1p(np.exp(d - 1))  # label smoothing 0.1, one margin for all
    np.testing.assert_allclose(loss_fn({"preference": 0.9, "margin": 1.0}), smooth.mean(), rtol=1e-5)


def test_a_pair_of_equals_is_learned_from_finitely_and_counts_as_wrong():
    _, params = scored()
    equal = {name: np.repeat(getattr(BATCH, name)[:, :1], 2, axis=1) for name in ("tokens", "segments")}
    nothing = np.zeros_like(BATCH.margin)
    batch = BATCH._replace(**equal, margin=nothing, preference=nothing + 1)
    value, report, gradient = value_and_gradient()(params, batch, {"centering_weight": 0.0})
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert report["rewards/accuracies"] == 0 and report["rewards/margins"] == 0
    # of a difference that is 0 whatever the parameters
    np.testing.assert_allclose(gradient["kernel"], np.zeros(gradient["kernel"].shape), atol=1e-6)


@pytest.mark.parametrize(
    "name, value",
    [
        ("tokens", np.repeat(BATCH.tokens[:, :1], 3, axis=1)),
        ("tokens", BATCH.tokens[:, 0]),
        ("segments", BATCH.segments[:, :, 1:]),
        ("preference", BATCH.tokens[:, 0, :2].astype(np.float32)),
        ("weights", BATCH.weights[None]),
    ],
)
def test_pairs_of_another_shape_are_refused(name, value):
    model, params = scored()
    batch = BATCH._replace(**{name: value})
    with pytest.raises(Exception, match="shape"):
        jax.eval_shape(reward_model.make_loss(model), params, batch, None, {})


def test_a_margin_of_too_few_pairs_is_named():
    model, params = scored()
    with pytest.raises(ValueError, match=r"batch.margin of shape \(15,\) has not the rows of weights of shape \(16,\)"):
        jax.eval_shape(reward_model.make_loss(model), params, BATCH._replace(margin=BATCH.margin[1:]), None, {})


def test_a_model_without_a_head_is_refused():
    model, params = tiny()
    with pytest.raises(ValueError, match=r"no scalar head.*with_score\(model\)"):
        jax.eval_shape(reward_model.make_loss(model), params, BATCH, None, {})
