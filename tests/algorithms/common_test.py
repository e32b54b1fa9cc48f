"""Every algorithm times every invariance of an update: a new algorithm is one row of `problems.problems`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    LENGTH,
    ROWS,
    assert_same,
    on_one_device,
    packed,
    problems,
    shared_prompt,
    three_updates,
    tiny,
    with_common_prompts,
)

from alignax import logprobs, train

NAMES = ("sft", "dpo", "kto", "grpo", "dapo", "reward_model", "ppo", "ppo_critic", "ppo_shared")


@pytest.fixture(scope="module", params=NAMES)
def problem(request):
    return problems()[request.param]


@pytest.fixture(scope="module")
def plain(problem):
    """An update of the batch as it is, logits materialised where it reads them: what everything else has to equal."""

    def materialised(measure, sides, arrays, chosen, *, chunk=None):
        del chunk
        logits = tuple(side.head(jax.vmap(lambda x, at: x[at])(side.states, side.at)) for side in sides)
        found = measure(logits, arrays, None)
        return {name: jnp.where(chosen, x, 0) for name, x in found.items()}

    run = on_one_device()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "measured", materialised)
        three_updates(problem, run=run)  # compiles
    return run


@pytest.fixture(scope="module")
def expected(problem, plain):
    return three_updates(problem, run=plain)


@pytest.fixture(scope="module")
def update(problem):
    """`three_updates` of a batch with longer padding, logits in blocks, parts of two rows or pairs: compiled once.

    All of that at a time, and for all tests that keep the shapes: it is compilation that costs.
    """
    run = on_one_device()

    def longer(x):
        return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 5)]) if x.shape[-1] == LENGTH else x

    def updated(problem):
        return three_updates(problem, run=run, batch=jax.tree.map(longer, problem.batch), microbatches=8)

    updated.traces = run.traces
    return updated


def test_every_problem_is_tested():
    assert set(NAMES) == set(problems())


def test_the_update_changes_something(problem, expected):
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(expected.gradient)) > 1e-3
    assert np.isfinite(expected.metrics["loss"])


def test_padding_microbatches_and_logits_in_blocks(problem, expected, update):
    assert_same(update(problem), expected)


def test_packed_rows(problem, expected):
    assert_same(three_updates(packed(problem), microbatches=2), expected)


def test_shared_prompts(problem, plain):
    problem = with_common_prompts(problem)
    assert_same(three_updates(shared_prompt(problem), microbatches=2), three_updates(problem, run=plain))


def test_permutation(problem, expected, update):
    order = np.random.default_rng(0).permutation(ROWS)
    assert_same(update(problem._replace(batch=jax.tree.map(lambda x: x[order], problem.batch))), expected)


def test_what_is_masked_or_weighs_nothing_does_not_matter(problem, expected, update):
    batch = problem.batch
    garbage = {"tokens": np.where(batch.segments, batch.tokens, 7)}  # padding may hold any id
    garbage["tokens"][2] = 10_000  # the filler row, any content, ids outside the vocabulary too
    for name in ("old_logp", "ref_logp", "old_values", "returns", "advantages"):
        if np.ndim(getattr(batch, name, None)) == 2:
            garbage[name] = np.where(batch.mask, getattr(batch, name), np.nan)
            garbage[name][2] = np.nan
    for name in ("advantages", "margin", "preference"):
        if np.ndim(getattr(batch, name, None)) == 1:
            garbage[name] = np.where(np.arange(ROWS) == 2, np.nan, getattr(batch, name))
    if hasattr(batch, "margin"):
        garbage["segments"] = np.where((np.arange(ROWS) == 2)[:, None, None], 1, batch.segments)
    garbage = {name: value.astype(getattr(batch, name).dtype) for name, value in garbage.items()}
    assert_same(update(problem._replace(batch=batch._replace(**garbage))), expected)


@pytest.mark.parametrize("name", ["dpo", "grpo"])
def test_a_missing_reference_is_named(name):
    problem, (model, params) = problems()[name], tiny()
    for frozen in (params["head"], [params]):
        with pytest.raises(ValueError, match=rf"frozen is a {type(frozen).__name__}; expected .*'reference': params"):
            jax.eval_shape(problem.make_loss(model), params, problem.batch, frozen, {})


def test_advantages_of_another_shape_are_refused():
    problem, (model, params) = problems()["grpo"], tiny()
    batch = problem.batch._replace(advantages=problem.batch.advantages.reshape(4, 4))
    with pytest.raises(AssertionError):
        jax.eval_shape(problem.make_loss(model), params, batch, problem.frozen, {})


def test_nothing_recompiles_when_a_number_changes(problem, update):
    update(problem)  # compiles, when no other test has
    assert len(update.traces) == 1
    for factor in (1.5, 0.5):
        hyper = {name: value * factor for name, value in problem.hyper.items()}
        assert np.isfinite(update(problem._replace(hyper=hyper)).metrics["loss"])
    assert len(update.traces) == 1


def test_a_learning_rate_recompiles_nothing_either():
    problem = problems()["dpo"]
    model, params = problem.start()
    loss_fn, traces = problem.make_loss(model), []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    update = jax.jit(train.make_update(counted, optimizer))
    state, seen = train.TrainState.create(params, optimizer), None
    for rate in (0.1, 0.15, 0.05):
        state.opt_state.hyperparams["learning_rate"] = jnp.asarray(rate)
        state, metrics = update(state, problem.batch, problem.frozen, problem.hyper)
        assert jnp.isfinite(metrics["loss"])
        seen = seen or len(traces)
    assert len(traces) == seen


def test_one_row_too_many_is_refused(problem):
    model, params = problem.start()
    update = train.make_update(problem.make_loss(model), optax.sgd(0.1), microbatches=3)
    with pytest.raises(ValueError, match=r"batch\.tokens has 16 rows, which do not divide into microbatches=3"):
        update(train.TrainState.create(params, optax.sgd(0.1)), problem.batch, problem.frozen, problem.hyper)
