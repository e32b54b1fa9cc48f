"""What learning from single answers does beyond the common invariances: statistics, a running delta, refusals."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import ROWS, assert_same, on_one_device, problems, small, three_updates

from alignax import losses, train
from alignax.algorithms import kto
from alignax.algorithms._fillers import blank
from alignax.logprobs import token_logprobs
from alignax.types import Mean


@pytest.fixture(scope="module")
def problem():
    return problems(small)["kto"]


@functools.cache
def logprobs():
    """Of every token, compiled once."""
    return jax.jit(partial(token_logprobs, small()[0]))


def log_ratios(problem, prefix=""):
    """Of whole answers, in float64, one by one: what the formulas are about."""
    tokens, segments, mask = (getattr(problem.batch, prefix + name) for name in ("tokens", "segments", "mask"))
    logp, ref = (
        np.asarray(logprobs()(p, tokens, segments, mask=mask), np.float64)
        for p in (small()[1], problem.frozen["reference"])
    )
    return np.sum(np.where(mask, logp - ref, 0.0), axis=1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_first_update_is_the_formula(problem):
    """Loss, KL and metrics by hand, over the rows that count; the empty mismatched row is left out of the KL."""
    model, params = small()
    batch, beta, hyper = problem.batch, 0.3, {"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.2}
    update = jax.jit(
        train.make_update(kto.make_loss(model), optax.sgd(0.0), statistics=kto.make_statistics(model), microbatches=2)
    )
    state = train.TrainState.create(params, optax.sgd(0.0))
    _, metrics = update(state, batch, problem.frozen, hyper)
    x, others, w, good = log_ratios(problem), log_ratios(problem, "mismatched_"), batch.weights, batch.desirable
    counted = w * batch.mismatched_mask.any(axis=1)
    assert counted.sum() == w.sum() - 1
    w = w * batch.mask.any(axis=1)  # an empty answer weighs nothing
    assert w.sum() == batch.weights.sum() - 1
    kl = np.sum(counted * others) / np.sum(counted)
    assert kl > 0.05
    loss = np.where(good, 0.7 * (1 - sigmoid(beta * (x - kl))), 1.2 * (1 - sigmoid(beta * (kl - x))))
    expected = {
        "kl": kl,
        "loss": np.sum(w * loss) / np.sum(w),
        "rewards/chosen": np.sum((w * beta * x)[good]) / np.sum(w[good]),
        "rewards/rejected": np.sum((w * beta * x)[~good]) / np.sum(w[~good]),
        "desirable_fraction": np.sum(w[good]) / np.sum(w),
        "dropped/empty": 1 / 15,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


def test_bco_over_micro_batches(problem):
    """The running delta too; micro-batches of two rows, one of which has none that counts."""
    weights = problem.batch.weights.copy()
    weights[[0, 8]] = 0  # strided: the two rows of the first of eight parts
    hyper = {"beta": 0.3, "delta": 0.5, "delta_rate": 0.25, "undesirable_weight": 1.5}
    bco = problem._replace(
        make_loss=partial(kto.make_loss, loss=losses.bco),
        statistics=partial(kto.make_statistics, loss=losses.bco),
        batch=problem.batch._replace(weights=weights),
        hyper=hyper,
    )
    run = on_one_device()
    expected = three_updates(bco, run=run)
    assert_same(three_updates(bco, microbatches=8), expected)
    model, params = small()
    statistics = kto.make_statistics(model, loss=losses.bco)
    assert statistics is not None
    found = jax.jit(lambda *x: statistics(*x)["delta"].value())(params, bco.batch, bco.frozen, hyper)
    counted = weights * problem.batch.mask.any(axis=1)
    mean = np.sum(counted * 0.3 * log_ratios(bco)) / np.sum(counted)
    np.testing.assert_allclose(found, 0.5 + 0.25 * (mean - 0.5), rtol=1e-5)
    running, _ = jax.jit(lambda mean: losses.bco_delta(0.5, 3.0, Mean(mean, jnp.ones(()))))(mean)  # one row in four
    np.testing.assert_allclose(running, found, rtol=1e-5)


def test_rows_that_weigh_nothing_change_nothing(problem):
    """Their mismatched rows and weights of class neither, NaN or ids out of the vocabulary."""
    weight = np.linspace(0.5, 2, ROWS).astype(np.float32)
    batch = problem.batch._replace(undesirable_weight=weight)
    garbage = {"mismatched_tokens": np.where(batch.mismatched_segments, batch.mismatched_tokens, 7)}
    garbage["mismatched_tokens"][2] = 10_000
    garbage["mismatched_segments"] = np.where((np.arange(ROWS) == 2)[:, None], 1, batch.mismatched_segments)
    garbage["undesirable_weight"] = np.where(np.arange(ROWS) == 2, np.nan, weight).astype(np.float32)
    garbage["desirable"] = np.where(np.arange(ROWS) == 2, ~batch.desirable, batch.desirable)
    blanked = jax.jit(blank)(batch._replace(**garbage))  # nor do they take part where a network's rows meet (experts)
    assert not any(np.any(getattr(blanked, name)[2]) for name in ("mismatched_segments", "undesirable_weight", "mask"))
    run = on_one_device()
    assert_same(
        three_updates(problem, run=run, batch=batch._replace(**garbage)), three_updates(problem, run=run, batch=batch)
    )


def test_the_references_log_probabilities_may_come_with_the_batch(problem):
    model, params = small()
    found = {}
    for prefix in ("", "mismatched_"):
        where = {name: getattr(problem.batch, prefix + name) for name in ("tokens", "segments", "mask")}
        found[f"{prefix}ref_logp"] = logprobs()(
            problem.frozen["reference"], where["tokens"], where["segments"], mask=where["mask"]
        )
    batch = problem.batch._replace(**found)
    statistics, loss = kto.make_statistics(model), kto.make_loss(model)
    assert statistics is not None

    @jax.jit
    def both(params, batch, frozen):
        kl = statistics(params, batch, frozen, {})["kl"].value()
        return kl, loss(params, batch, frozen, {"kl": kl})[0]["rows"].mean.value()

    np.testing.assert_allclose(both(params, batch, None), both(params, problem.batch, problem.frozen), rtol=1e-5)


def test_the_statistics_have_no_gradient(problem):
    model, params = small()

    def total(params, batch, loss):
        return sum(x.value() for x in kto.make_statistics(model, loss=loss)(params, batch, problem.frozen, {}).values())

    @jax.jit
    def gradients(params, batch):
        return [jax.grad(total)(params, batch, loss) for loss in (losses.kto, losses.bco)]

    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(gradients(params, problem.batch)))


def test_a_loss_without_statistics(problem):
    model, params = small()
    assert kto.make_statistics(model, loss=losses.apo_zero_unpaired) is None
    assert kto.make_statistics(model, loss=partial(losses.kto, kl=0.0)) is None
    batch = problem.batch._replace(**{f"mismatched_{name}": None for name in ("tokens", "segments", "mask")})

    @jax.jit
    def values(params, batch, frozen):
        found = []
        for loss in (losses.apo_zero_unpaired, partial(losses.kto, kl=-1.0)):
            terms, metrics = kto.make_loss(model, loss=loss)(params, batch, frozen, {"beta": 0.3})
            assert "kl" not in metrics
            found.append(terms["rows"].mean.value())
        return found

    apo, same = values(params, batch, problem.frozen)
    assert apo == same


def test_one_class_alone(problem):
    model, params = small()
    batch = problem.batch._replace(desirable=np.ones(ROWS, bool))

    @jax.jit
    def run(params, batch, frozen):
        terms, metrics = kto.make_loss(model)(params, batch, frozen, {"kl": 0.1})
        return terms["rows"].mean.value(), [metrics[name].value() for name in names], metrics["rewards/rejected"].count

    names = ("desirable_fraction", "rewards/rejected")
    loss, (fraction, rejected), count = run(params, batch, problem.frozen)
    assert np.isfinite(loss) and fraction == 1
    assert count == 0 and rejected == 0


def test_refusals(problem):
    model, params = small()
    batch, frozen = problem.batch, problem.frozen

    def refuses(message, function, *args):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(function, params, *args)

    loss, statistics = kto.make_loss(model), kto.make_statistics(model)
    refuses(
        r"the loss needs kl, .* hyper holds \['beta'\]; give make_update statistics", loss, batch, frozen, {"beta": 1}
    )
    refuses("the loss needs delta", kto.make_loss(model, loss=losses.bco), batch, frozen, {})
    refuses("batch has no mismatched_tokens", statistics, batch._replace(mismatched_tokens=None), frozen, {})
    for wrong in (None, params["head"]):
        refuses(rf"batch.ref_logp is None and frozen is a {type(wrong).__name__}", loss, batch, wrong, {"kl": 0.0})
    refuses("batch.mismatched_ref_logp is None", statistics, batch, None, {})
    with pytest.raises(AssertionError):
        jax.eval_shape(loss, params, batch._replace(desirable=batch.desirable[:3]), frozen, {"kl": 0.0})
