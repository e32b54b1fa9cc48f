"""What preference optimisation does beyond DPO: extras, a supervised summand, statistics, losses of a whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import problems, small, three_updates

from alignax import losses, reduce, train
from alignax.algorithms import preference
from alignax.losses.extras import extra, needs, whole_batch


@pytest.fixture(scope="module")
def problem():
    return problems(small)["dpo"]


@pytest.fixture(scope="module")
def dense(problem):
    """(logp, ref_logp) of every token of the vocabulary at every place, float64 [B, 2, T, V]; 0 at the first place."""
    (model, params), batch = small(), problem.batch
    rows = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments)]
    run = jax.jit(lambda weights: model.logits(weights, model.hidden(weights, *map(jnp.asarray, rows)).states))

    def of(weights):
        logits = np.asarray(run(weights), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.pad(logp[:, :-1], ((0, 0), (1, 0), (0, 0))).reshape(*batch.tokens.shape, -1)

    return of(params), of(problem.frozen["reference"])


def counted(batch):
    """The weights: 0 also where a side is empty."""
    return batch.weights * batch.mask.any(-1).all(-1)


def weighted_mean(x, batch):
    return np.sum(x * counted(batch)) / np.sum(counted(batch))


def own_logp(dense, problem):
    """Log-probabilities of the rows' own tokens, float64 [B, 2, T], 0 where masked out."""
    tokens, mask = problem.batch.tokens, problem.batch.mask
    return np.where(mask, np.take_along_axis(dense[0], tokens[..., None], -1)[..., 0], 0)


def values(found):
    """Terms as (weight, mean) and metrics as numbers."""
    terms, metrics = found
    return {name: (t.weight, t.mean.value()) for name, t in terms.items()}, {n: m.value() for n, m in metrics.items()}


def evaluated(loss_fn, problem, batch=None, **hyper):
    _, params = small()
    run = jax.jit(lambda *arguments: values(loss_fn(*arguments)))
    return jax.tree.map(np.asarray, run(params, batch or problem.batch, problem.frozen, hyper))


def test_extras_that_the_models_give(problem, dense):
    @needs("log_sum_p2", "forward_kl")
    def loss(chosen, rejected):
        return sum(jnp.sum(jnp.where(s.mask, extra(s, name, "loss"), 0.0), -1) * (1 + i)
                   for i, s in enumerate((chosen, rejected)) for name in loss.needs)  # fmt: skip

    logp, ref_logp = dense
    mask = problem.batch.mask[..., None, :][..., 0, :]
    p2, kl = np.log(np.sum(np.exp(logp) ** 2, -1)), np.sum(np.exp(ref_logp) * (ref_logp - logp), -1)
    sums = np.where(mask, p2 + kl, 0).sum(-1)
    terms, metrics = evaluated(preference.make_loss(small()[0], loss=loss), problem)
    np.testing.assert_allclose(terms["pairs"][1], weighted_mean(sums[:, 0] + 2 * sums[:, 1], problem.batch), rtol=2e-5)
    expected = weighted_mean(np.where(mask, kl, 0).sum(-1)[:, 1], problem.batch)
    np.testing.assert_allclose(metrics["kl/rejected"], expected, rtol=2e-5)


def test_extras_of_the_batch_and_of_degraded_prompts(problem, dense):
    @needs("reward", "margin", "degraded_logp", "degraded_ref_logp", "degraded_mask")
    def loss(chosen, rejected):
        degraded = jnp.where(chosen.extra["degraded_mask"], chosen.extra["degraded_logp"], 0.0)
        assert rejected.extra["degraded_ref_logp"].shape == degraded.shape
        return chosen.extra["margin"] * (chosen.extra["reward"] - rejected.extra["reward"]) + jnp.sum(degraded, -1)

    rng = np.random.default_rng(0)
    extras = {"reward": rng.normal(size=(16, 2)), "margin": rng.normal(size=16)}
    extras = {name: x.astype(np.float32) for name, x in extras.items()}
    extras["reward"][2] = np.nan  # of a pair that weighs nothing
    own = [x[:, 0] for x in (problem.batch.tokens, problem.batch.segments, problem.batch.mask)]
    batch = problem.batch._replace(extra=extras, degraded=preference.Rows(*own))
    model, params = small()
    expected = extras["margin"] * (extras["reward"] @ [1, -1]) + own_logp(dense, problem)[:, 0].sum(-1)
    expected[2] = 0
    terms, _ = evaluated(preference.make_loss(model, loss=loss), problem, batch)
    np.testing.assert_allclose(terms["pairs"][1], weighted_mean(expected, problem.batch), rtol=2e-5)
    ahead = batch._replace(degraded=preference.Rows(*own, np.full(own[2].shape, -3.0, np.float32)))
    sides = jax.jit(functools.partial(preference.sides, model, names=loss.needs))
    chosen, _ = sides(params, ahead, problem.frozen)
    assert np.all(np.asarray(chosen.extra["degraded_ref_logp"]) == -3)  # as it came, and not computed
    for incomplete in (
        problem.batch,
        batch._replace(degraded=None),
        batch._replace(extra={"margin": extras["margin"]}),
    ):
        with pytest.raises(ValueError, match=r"the loss needs \[.*batch.extra holds"):
            jax.eval_shape(preference.make_loss(model, loss=loss), params, incomplete, problem.frozen, {})


@pytest.mark.parametrize(
    "loss, refused",
    [
        (losses.dpo, True),
        (functools.partial(losses.gpo, convex=losses.gpo_hinge), True),
        (losses.mixture({losses.simpo: 1.0, losses.dpo: 0.1}), True),
        (losses.orpo, False),
        (functools.partial(losses.simpo, gamma=1.0), False),
        (losses.wpo(losses.cpo), False),
        (losses.wpo(functools.partial(losses.simpo, gamma=1.0)), False),
        (losses.mixture({losses.simpo: 1.0, losses.cpo: 0.1}), False),
    ],
)
def test_a_reference_that_was_forgotten_is_asked_for(problem, loss, refused):
    model, params = small()
    run = functools.partial(jax.eval_shape, preference.make_loss(model, loss=loss), params)
    if refused:
        with pytest.raises(ValueError, match="the loss reads a reference, and there is none; expected frozen="):
            run(problem.batch, None, {})
        run(problem.batch._replace(ref_logp=np.zeros(problem.batch.mask.shape, np.float32)), None, {})
    else:
        run(problem.batch, None, {})
    run(problem.batch, problem.frozen, {})


@pytest.mark.parametrize("over_prompt", [False, True])
def test_the_supervised_summand(problem, dense, over_prompt):
    batch, (logp, _) = problem.batch, dense
    mask = (batch.segments[:, 0] != 0) & (np.arange(batch.tokens.shape[-1]) > 0) if over_prompt else batch.mask[:, 0]
    own = np.take_along_axis(logp, batch.tokens[..., None], -1)[:, 0, :, 0]
    weights = mask * counted(batch)[:, None]
    options = {"nll_weight": 0.3, "nll_over_prompt": over_prompt}
    make = functools.partial(preference.make_loss, small()[0])

    @jax.jit
    def run(params, frozen):
        numbers = [(make(**options), {}), (make(), {})]
        numbers += [(make(nll_mean=reduce.sequence_sum, **options), {"nll_weight": 2.0})]
        arrays = jax.tree.map(jnp.asarray, batch)
        return [values(loss_fn(params, arrays, frozen, {"beta": 0.3} | hyper))[0] for loss_fn, hyper in numbers]

    terms, plain, sums = jax.tree.map(np.asarray, run(small()[1], problem.frozen))
    np.testing.assert_allclose(terms["nll"], (0.3, np.sum(-own * weights) / np.sum(weights)), rtol=2e-5)
    np.testing.assert_allclose(terms["pairs"], plain["pairs"], rtol=1e-6)
    per_row = np.sum(-own * mask, -1) @ counted(batch) / np.sum(counted(batch))
    np.testing.assert_allclose(sums["nll"], (2.0, per_row), rtol=2e-5)


def test_metrics_of_losses_of_average_tokens(problem, dense):
    _, metrics = evaluated(preference.make_loss(small()[0], reward=preference.average), problem, beta=2.0)
    mean = own_logp(dense, problem)[:, 0].sum(-1) / np.maximum(problem.batch.mask[:, 0].sum(-1), 1)
    np.testing.assert_allclose(metrics["rewards/chosen"], 2 * weighted_mean(mean, problem.batch), rtol=1e-5)


def test_a_loss_of_the_whole_batch_is_not_split(problem):
    @whole_batch
    def loss(chosen, rejected, *, weights):
        return jnp.sort(chosen.sum) * weights

    model, params = small()
    loss_fn = preference.make_loss(model, loss=loss)
    for options in ({"microbatches": 2}, {"axis_name": "data"}):
        with pytest.raises(ValueError, match="cannot be split"):
            train.make_update(loss_fn, optax.sgd(0.1), **options)
    update = train.make_update(loss_fn, optax.sgd(0.1))
    jax.eval_shape(update, train.TrainState.create(params, optax.sgd(0.1)), problem.batch, problem.frozen, {})


def test_statistics_of_all_micro_batches(problem):
    def make_loss(model):
        return preference.make_loss(model, loss=losses.kto_pair)

    whole, parts = (
        three_updates(problem._replace(make_loss=make_loss), microbatches=m, statistics=preference.make_statistics)
        for m in (1, 4)
    )
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(whole.gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), parts.gradient, whole.gradient
    )


def test_numbers_of_the_whole_batch_and_weights_of_every_row_are_asked_for(problem):
    model, params = small()
    with pytest.raises(ValueError, match=r"needs \['kl_chosen', 'kl_rejected'\], and hyper holds \[\]; .*statistics="):
        evaluated(preference.make_loss(model, loss=losses.kto_pair), problem)
    for rows in (1, 3):
        with pytest.raises(ValueError, match="has not the rows of weights of shape"):
            batch = problem.batch._replace(weights=np.ones(rows, np.float32))
            jax.eval_shape(preference.make_loss(model), params, batch, problem.frozen, {})


def test_reference_schedules():
    old, new = {"w": np.array([0.0, 2.0], np.float32)}, {"w": np.array([1.0, -2.0], np.float32)}

    @jax.jit
    def run(old, new, step):
        return [train.ema_every(old, new, step, every=3, **rate)["w"] for rate in ({"rate": 0.6}, {})]

    soft = [run(old, new, step)[0] for step in (1, 2, 3, 4, 6)]
    np.testing.assert_allclose(soft, [[0, 2], [0, 2], [0.6, -0.4], [0, 2], [0.6, -0.4]], atol=1e-7)
    np.testing.assert_allclose(run(old, new, 6)[1], new["w"])  # the hard update
    with pytest.raises(ValueError, match="every=0; expected at least 1"):
        train.ema_every(old, new, 6, every=0)
