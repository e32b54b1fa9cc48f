"""Nash-MD's update: its gradient by hand, what reaches it, its metrics, its invariances."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import LENGTH, ROWS, VOCAB, Problem, assert_same, on_one_device, rows, three_updates
from references.toys import chain

from alignax import losses, reduce
from alignax.algorithms import nash_md
from alignax.logprobs import token_logprobs


def start():
    """A Markov chain: it compiles in no time."""
    return chain(), jnp.asarray(np.random.default_rng(0).normal(size=(VOCAB, VOCAB)), jnp.float32)


@pytest.fixture(scope="module")
def problem():
    rng, weights = np.random.default_rng(1), np.ones(ROWS, np.float32)
    weights[2], weights[5] = 0, 0.5
    _, params = start()
    batch = nash_md.Batch(**rows(ROWS), preference=rng.uniform(size=ROWS).astype(np.float32), weights=weights)
    frozen = {"reference": jax.tree.map(lambda x: 0.9 * x, params)}
    return Problem(nash_md.make_loss, batch, frozen, {"kl_weight": 0.3, "temperature": 0.8}, start)


@pytest.fixture(scope="module")
def run():
    return on_one_device()


@pytest.fixture(scope="module")
def expected(problem, run):
    return three_updates(problem, run=run)


def test_microbatches_and_padding(problem, expected):
    def longer(x):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 5)]) if x.shape[-1] == LENGTH else x

    assert_same(three_updates(problem, batch=jax.tree.map(longer, problem.batch), microbatches=4), expected)


def test_order_and_fillers(problem, expected, run):
    order = np.random.default_rng(0).permutation(ROWS)
    assert_same(three_updates(problem, run=run, batch=jax.tree.map(lambda x: x[order], problem.batch)), expected)
    batch, filler = problem.batch, np.arange(ROWS) == 2
    dirty = batch._replace(
        tokens=np.where(filler[:, None], 3, np.where(batch.segments, batch.tokens, 7)).astype(np.int32),
        preference=np.where(filler, np.float32(np.nan), batch.preference),
    )
    assert_same(three_updates(problem, run=run, batch=dirty), expected)


@pytest.mark.parametrize("form", ["causal", "sequence", "trl"])
def test_the_gradient_is_that_of_weighted_log_probabilities(problem, form):
    """Weights in numpy, then REINFORCE."""
    model, params = start()
    batch, loss = problem.batch, {"causal": losses.nash_md, "sequence": losses.nash_md_sequence}
    loss_fn = nash_md.make_loss(model, loss=loss.get(form, losses.nash_md_trl), kl_weight=0.3, temperature=0.8)

    @jax.jit
    def logp(params):
        tokens, segments, mask = (jnp.asarray(x) for x in (batch.tokens, batch.segments, batch.mask))
        return token_logprobs(model, params, tokens, segments, mask=mask, temperature=0.8)

    d = np.asarray(logp(params)) - np.asarray(logp(problem.frozen["reference"]))
    kl = {"causal": np.cumsum(d[:, ::-1], axis=1)[:, ::-1], "sequence": d.sum(axis=1, keepdims=True), "trl": d}[form]
    weights = batch.preference[:, None] - 0.5 - 0.3 * kl
    rows_counted = batch.weights * batch.mask.any(axis=1)

    def reinforce(params):
        per_row = jnp.sum(jnp.where(batch.mask, weights * logp(params), 0.0), axis=1)
        return -jnp.sum(rows_counted * per_row) / rows_counted.sum()

    def ours(params):
        terms, metrics = loss_fn(params, jax.tree.map(jnp.asarray, batch), problem.frozen, {})
        return terms["policy"].mean.value(), {name: metric.value() for name, metric in metrics.items()}

    both = jax.jit(
        lambda params: (jax.value_and_grad(ours, has_aux=True)(params), jax.value_and_grad(reinforce)(params))
    )
    ((value, metrics), gradient), (wanted, expected) = jax.tree.map(np.asarray, both(params))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=2e-6 * largest), gradient, expected)
    score = -np.sum(rows_counted * np.sum((batch.preference[:, None] - 0.5) * np.asarray(logp(params)), axis=1))
    np.testing.assert_allclose(metrics["loss/score"], score / rows_counted.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/kl"], value - score / rows_counted.sum(), rtol=1e-4)
    mean = np.sum(rows_counted * batch.preference) / rows_counted.sum()
    np.testing.assert_allclose(metrics["rewards/probabilities"], mean, rtol=1e-6)


def test_reference_log_probabilities_may_come_with_the_batch(problem, expected):
    model, params = start()
    batch = problem.batch
    ref_logp = jax.jit(partial(token_logprobs, model))(
        problem.frozen["reference"], batch.tokens, batch.segments, mask=batch.mask, temperature=0.8
    )
    given = problem._replace(batch=batch._replace(ref_logp=ref_logp), frozen=None)
    assert_same(three_updates(given), expected)
    for frozen in (None, [params]):
        with pytest.raises(ValueError, match=rf"nash_md: .* {type(frozen).__name__}; expected .*'reference': params"):
            jax.eval_shape(problem.make_loss(model), params, problem.batch, frozen, {})


def test_another_mean(problem):
    model, params = start()

    @jax.jit
    def run(*arguments):
        return [
            nash_md.make_loss(model, **options)(*arguments, {})[0]["policy"].mean
            for options in ({"mean": reduce.token_mean}, {})
        ]

    per_token, per_row = run(params, problem.batch, problem.frozen)
    np.testing.assert_allclose(per_token.total, per_row.total, rtol=1e-6)
    assert per_token.count > per_row.count
