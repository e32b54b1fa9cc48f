"""PPO on a problem whose optimum is known, and each of its parts against numbers written out."""

import functools
import json
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import problems, scored, small, tiny
from references import policy_gradient
from references import value as critic

from alignax import losses, models, reduce, sampling, train
from alignax.algorithms import ppo
from alignax.algorithms._policy import policy_metrics
from alignax.logprobs import score, token_logprobs, token_values
from alignax.types import Hidden, Scalar

ARMS = 4
START = ARMS  # the one token of the prompt, never an answer
RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(size=(ARMS + 1, ARMS + 1)).astype(np.float32)
REWARDS = RNG.normal(size=(ARMS, ARMS)).astype(np.float32)


def answers(table):
    """The probability of each answer of two arms behind START, in float64."""
    odds = np.exp(np.asarray(table, np.float64)[:, :ARMS])
    p = odds / odds.sum(axis=1, keepdims=True)
    return p[START][:, None] * p[:ARMS]


def optimum(kl_coef):
    """What maximises E[reward] - kl_coef KL(policy || reference): reference * exp(reward / kl_coef), normalised."""
    tilted = answers(REFERENCE) * np.exp(REWARDS / kl_coef)
    return tilted / tilted.sum()


@functools.cache
def bandit_solver(samples=512, rollouts=80, epochs=2, minibatches=2):
    """Compiles `solve(kl_coef, whiten) -> table`: PPO from the reference on; policy and critic are tables of logits
    and values, a row for each last token."""
    policy = models.from_apply(lambda table, tokens, _: jnp.where(jnp.arange(ARMS + 1) < ARMS, table[tokens], -1e9))
    states = models.from_apply(lambda table, tokens, _: table[tokens])
    critic = models.with_score(states)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, rollouts * epochs * minibatches))
    update = train.make_update(ppo.make_loss(policy), optimizer)
    update_critic = train.make_update(ppo.make_value_loss(critic), optimizer)
    prompts, lengths = jnp.full((samples, 1), START), jnp.ones(samples, jnp.int32)

    def learn(learners, part):
        actor, judge = learners
        return (update(actor, part)[0], update_critic(judge, part)[0]), None

    def rollout(options, learners, key):
        sample_key, *order_keys = jax.random.split(key, 1 + epochs)
        table, values = (learner.params for learner in learners)
        drawn = sampling.generate(policy, table, prompts, lengths, sample_key, max_new_tokens=2)
        where = {"tokens": drawn.tokens, "segments": drawn.segments, "mask": drawn.mask}
        batch, _ = ppo.experience(
            drawn,
            jnp.asarray(REWARDS)[drawn.tokens[:, 1], drawn.tokens[:, 2]],
            logp=token_logprobs(policy, table, **where),
            ref_logp=token_logprobs(policy, jnp.asarray(REFERENCE), **where),
            values=token_values(critic, values, **where),
            **options,
        )
        parts = [part for order in order_keys for part in train.minibatches(order, batch, minibatches)]
        return jax.lax.scan(learn, learners, jax.tree.map(lambda *x: jnp.stack(x), *parts))

    @jax.jit
    def solve(kl_coef, whiten):
        options = {"kl_coef": kl_coef, "normalise": lambda x, mask: jnp.where(whiten, reduce.whiten(x, mask), x)}
        value = models.add_score(states, jnp.zeros((ARMS + 1, ARMS + 1)), jax.random.key(1))
        learners = tuple(train.TrainState.create(params, optimizer) for params in (jnp.asarray(REFERENCE), value))
        keys = jax.random.split(jax.random.key(0), rollouts)
        return jax.lax.scan(partial(rollout, options), learners, keys)[0][0].params

    return solve


@pytest.mark.parametrize("kl_coef", [0.5, 1.0])
@pytest.mark.parametrize("whiten", [True, False])
def test_a_bandit_ends_at_its_optimum(whiten, kl_coef):
    found = answers(bandit_solver()(kl_coef, whiten))
    assert np.abs(found - optimum(kl_coef)).sum() / 2 < 0.01
    # a weight that is a tenth off is further away
    assert np.abs(found - optimum(1.1 * kl_coef)).sum() / 2 > 0.02
    assert np.abs(answers(REFERENCE) - optimum(kl_coef)).sum() / 2 > 0.3


class Rows(NamedTuple):
    tokens: jax.Array
    segments: jax.Array
    mask: jax.Array


KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def rollout():
    """Six rows: a gap in the mask, an empty row, one of a single token, one that weighs 0."""
    rng = np.random.default_rng(1)
    x = {name: rng.normal(size=(6, 9)).astype(np.float32) for name in ("logp", "ref_logp", "values")}
    mask = np.arange(9) >= 3
    mask = np.stack([mask & (np.arange(9) < end) for end in (9, 3, 4, 7, 8, 9)])
    mask[0, 5:7] = False
    x |= {name: rng.normal(size=6).astype(np.float32) for name in ("scores", "bootstrap")}
    return x | {"mask": mask, "weights": np.array([1, 1, 1, 1, 0, 1], np.float32)}


def loop_experience(x, *, kl, kl_coef, gamma, lambda_, whiten):
    """Advantages, returns and metrics, one token after the other."""
    advantages, returns, sums = np.zeros(x["mask"].shape), np.zeros(x["mask"].shape), []
    live = [b for b in range(len(advantages)) if x["weights"][b] and x["mask"][b].any()]
    for b in live:
        chosen = np.flatnonzero(x["mask"][b])
        d = [float(x["logp"][b, t]) - float(x["ref_logp"][b, t]) for t in chosen]
        penalty = [-kl_coef * KL[kl](step) for step in d]
        paid = [*penalty[:-1], penalty[-1] + x["scores"][b]]
        advantage, value = 0.0, x["bootstrap"][b]
        for t, reward in zip(chosen[::-1], paid[::-1], strict=True):
            advantage = reward + gamma * value - x["values"][b, t] + gamma * lambda_ * advantage
            value = x["values"][b, t]
            advantages[b, t], returns[b, t] = advantage, advantage + value
        sums.append([sum(d), -sum(x["logp"][b, chosen]), x["scores"][b], sum(penalty), sum(paid)])
    live = x["mask"] & (x["weights"] > 0)[:, None]
    names = ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward")
    metrics = {f"objective/{name}": value for name, value in zip(names, np.mean(sums, axis=0), strict=True)}
    metrics |= {"returns/mean": returns[live].mean(), "returns/std": returns[live].std()}
    metrics["values/mean"] = x["values"][live].mean()
    metrics["values/explained_variance"] = 1 - (returns - x["values"])[live].var() / returns[live].var()
    if whiten:
        spread = advantages[live].std(ddof=1)
        advantages[live] = (advantages[live] - advantages[live].mean()) / spread
    return advantages, returns, metrics


@functools.cache
def compiled(kl, normalise):
    return jax.jit(partial(ppo.experience, kl=kl, normalise=normalise))


def our_experience(x, kl=losses.k1, normalise=reduce.whiten, **hyper):
    shape = x["mask"].shape
    given = Rows(jnp.zeros(shape, int), jnp.ones(shape, int), x["mask"])
    arrays = {name: x[name] for name in ("logp", "ref_logp", "values", "bootstrap", "weights")}
    return compiled(kl, normalise)(given, x["scores"], **arrays, **hyper)


@pytest.mark.parametrize(
    "kl, whiten, gamma, lambda_", [("k1", True, 1.0, 0.95), ("k2", False, 0.9, 0.8), ("k3", True, 1.0, 1.0)]
)
def test_experience_equals_a_loop(kl, whiten, gamma, lambda_):
    x = rollout()
    hyper = {"kl_coef": 0.3, "gamma": gamma, "lambda_": lambda_}
    advantages, returns, expected = loop_experience(x, kl=kl, whiten=whiten, **hyper)
    # what weighs nothing and what is masked out may be anything
    filler = x["weights"] == 0
    dirty = {name: np.where(x["mask"] & ~filler[:, None], x[name], np.nan) for name in ("logp", "ref_logp", "values")}
    dirty |= {name: np.where(x["mask"].any(1) & ~filler, x[name], np.nan) for name in ("scores", "bootstrap")}
    normalise = reduce.whiten if whiten else None
    batch, metrics = our_experience(x | dirty, kl=getattr(losses, kl), normalise=normalise, **hyper)
    np.testing.assert_allclose(batch.advantages, advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(batch.returns, returns, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(batch.mask, x["mask"] & ~filler[:, None])
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_row_without_a_score_is_a_row_that_weighs_nothing():
    x, hyper = rollout(), {"kl_coef": 0.3}
    row = int(np.flatnonzero(x["weights"])[0])
    unscored, weightless = ({**x, name: x[name].copy()} for name in ("scores", "weights"))
    unscored["scores"][row], weightless["weights"][row] = np.nan, 0
    (batch, metrics), (expected, others) = our_experience(unscored, **hyper), our_experience(weightless, **hyper)
    np.testing.assert_array_equal(batch.mask, expected.mask)
    np.testing.assert_allclose(batch.advantages, expected.advantages, atol=1e-6)
    for name in ("objective/scores", "returns/mean", "values/explained_variance"):
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-6, err_msg=name)


def test_a_rollout_of_which_nothing_counts_says_nothing():
    x = rollout()
    hyper = {"kl_coef": 0.3, "gamma": 1.0, "lambda_": 0.95}
    batch, metrics = our_experience(x | {"mask": np.zeros_like(x["mask"])}, **hyper)
    assert all(value == 0 for value in metrics.values()) and not np.any(batch.advantages)


@pytest.mark.parametrize(
    "name, shape", [("scores", (5,)), ("scores", (6, 9)), ("values", (6, 8)), ("weights", (5,)), ("bootstrap", (5,))]
)
def test_experience_refuses_arrays_of_other_shapes(name, shape):
    with pytest.raises(Exception, match=r"shape|type"):
        our_experience(rollout() | {name: np.ones(shape, np.float32)})


def test_the_first_minibatch_has_ratio_1_and_the_values_of_the_rollout():
    (policy, params), (critic, critic_params) = tiny(), scored()
    prompts, lengths = np.random.default_rng(0).integers(3, 32, (8, 5)), np.array([1, 5, 4, 3, 2, 5, 5, 3])
    generate = jax.jit(partial(sampling.generate, policy, max_new_tokens=12, group=2, eos_ids=(1, 2)))
    drawn = generate(params, prompts, lengths, jax.random.key(0), temperature=0.7)

    @jax.jit
    def collect(params, critic_params, drawn):
        where = {"tokens": drawn.tokens, "segments": drawn.segments, "mask": drawn.mask}
        logp = token_logprobs(policy, params, **where, temperature=0.7)
        values = token_values(critic, critic_params, **where)
        scores = jax.random.normal(jax.random.key(1), lengths.shape).repeat(2)
        batch = ppo.experience(drawn, scores, logp=logp, ref_logp=logp - 0.1, values=values)[0]
        said = batch._replace(old_logp=drawn.logp)  # by the sampler
        return batch, *(next(train.minibatches(jax.random.key(2), x, 2)) for x in (batch, said))

    batch, part, sampler = jax.tree.map(np.asarray, collect(params, critic_params, drawn))
    assert batch.mask.sum() > 100
    np.testing.assert_allclose(batch.old_logp, drawn.logp, rtol=0, atol=1e-5)

    @jax.jit
    def measure(params, critic_params, part):
        of_policy = train.make_measure(ppo.make_loss(policy))(params, part, None, {"temperature": 0.7})
        return train.merge([of_policy | train.make_measure(ppo.make_value_loss(critic))(critic_params, part)])

    for minibatch in (part, sampler):
        metrics = measure(params, critic_params, minibatch)
        np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=0, atol=1e-6)
        np.testing.assert_allclose(metrics["ratio/max"], 1.0, rtol=0, atol=1e-5)
        assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] < 1e-9
    chosen = np.asarray(part.mask)
    values, returns = (np.asarray(x, np.float64)[chosen] for x in (part.old_values, part.returns))
    np.testing.assert_allclose(metrics["loss/policy"], -np.asarray(part.advantages)[chosen].mean(), atol=1e-6)
    np.testing.assert_allclose(metrics["loss/value"], ((values - returns) ** 2).mean() / 2, rtol=1e-5)
    np.testing.assert_allclose(metrics["values"], values.mean(), rtol=1e-5)
    assert metrics["values/clip_fraction"] == 0


USED = ("mask", "weights", "old_logp", "advantages", "old_values", "returns", "logp", "entropy", "values")


def test_every_loss_function_gives_the_terms_of_the_formula():
    """Off the rollout's policy and critic; a policy that is its own critic gives the terms of both."""
    model, params = scored(small, shared=True)
    policy, _ = small()
    batch = problems(small)["ppo_shared"].batch
    hyper: dict[str, Scalar] = {"clip_low": 0.1, "entropy_weight": 0.05, "temperature": 0.8}

    @jax.jit
    def terms(params, batch):
        shared, _ = ppo.make_shared_loss(model)(params, batch, None, hyper | {"value_weight": 0.3, "value_clip": 0.5})
        apart = ppo.make_loss(policy)(params["backbone"], batch, None, hyper)[0]
        apart |= ppo.make_value_loss(model)(params, batch, None, {"clip": 0.5})[0]
        where = (model, params, batch.tokens, batch.segments)
        shared, apart = ({n: (t.weight, t.mean.value()) for n, t in found.items()} for found in (shared, apart))
        return shared, apart, score(*where, mask=batch.mask, temperature=0.8, want=("entropy", "values"))

    shared, apart, scores = jax.tree.map(np.asarray, terms(params, batch))
    x = {
        name: np.asarray(value, np.float64)
        for name, value in (batch._asdict() | scores._asdict()).items()
        if name in USED
    }
    per_token = {
        "policy": policy_gradient.ppo_clip(x, clip_low=0.1),
        "entropy": x["entropy"],
        "value": critic.value_clip(x, clip=0.5),
    }
    assert set(shared) == set(apart) == set(per_token)
    weights = x["weights"][:, None] * x["mask"]
    for name, of_shared, of_apart in (("policy", 1, 1), ("entropy", -0.05, -0.05), ("value", 0.3, 1)):
        expected = (weights * per_token[name]).sum() / weights.sum()
        for found, weight in ((shared[name], of_shared), (apart[name], of_apart)):
            np.testing.assert_allclose(found[0], weight, rtol=1e-6, err_msg=name)
            np.testing.assert_allclose(found[1], expected, rtol=2e-5, err_msg=name)


@pytest.fixture(scope="module")
def vectors(shared):
    return json.loads((shared / "spec" / "vectors_online.json").read_text())


def test_policy_metrics_of_other_programs(vectors):
    vectors = [vector for vector in vectors if vector["function"] == "ppo_clip_loss"]
    assert [vector["id"] for vector in vectors] == [f"V06{i}" for i in range(1, 7)]

    @jax.jit
    def metrics(*arrays):
        found = policy_metrics(losses.ppo_clip, *arrays)
        return {name: metric.value() for name, metric in found.items()}

    for vector in vectors:
        x, hyper, expected = vector["inputs"], vector["hyperparameters"], vector["expected"]
        logp, old_logp, advantages, mask = (np.array(x[name]) for name in ("logp", "old_logp", "adv", "mask"))
        clips = {"clip_low": hyper["eps_low"], "clip_high": hyper["eps_high"], "dual_clip": hyper.get("dual_clip_c")}
        found = metrics(logp, old_logp, advantages, mask, None, clips)
        # theirs tells clipping by the lower bound of a bad token's loss (dual clip) apart
        clipped = expected["clipfrac"] + expected.get("clipfrac_lower", 0)
        np.testing.assert_allclose(found["clip_fraction"], clipped, atol=1e-6, err_msg=vector["id"])
        np.testing.assert_allclose(found["ratio"], expected.get("ratio_mean", 0), atol=1e-6)
        largest = np.exp(np.subtract(x["logp"], x["old_logp"]))[np.array(x["mask"]) > 0].max(initial=0)
        np.testing.assert_allclose(found["ratio/max"], largest, rtol=1e-6)


def test_value_metrics_of_other_programs(vectors):
    """A critic that says what the vector says: its states are its parameters, one for each token."""
    critic = small()[0]._replace(
        hidden=lambda params, tokens, segments, **_: Hidden(params[..., None], None, {}),
        values=lambda params, states: states[..., 0],
    )
    vectors = [vector for vector in vectors if vector["id"] in ("V070", "V071")]
    assert len(vectors) == 2
    for vector in vectors:
        x, expected = vector["inputs"], vector["expected"]
        behind = {name: np.pad(np.array(x[name]), ((0, 0), (1, 0))) for name in ("old_values", "returns", "mask")}
        tokens = np.zeros(behind["mask"].shape, np.int32)
        batch = ppo.Batch(tokens, tokens + 1, old_logp=tokens, advantages=tokens, **behind)
        params = np.pad(np.float32(x["values"]), ((0, 0), (0, 1)))
        loss_fn = ppo.make_value_loss(
            critic, value_loss=partial(losses.value_clip, clip=vector["hyperparameters"]["clip_eps"])
        )

        @partial(jax.value_and_grad, has_aux=True)
        def learn(params, batch):
            terms, metrics = loss_fn(params, batch, None, {})
            return terms["value"].mean.value(), {name: metric.value() for name, metric in metrics.items()}

        learn = jax.jit(learn)
        (loss, metrics), gradient = jax.tree.map(np.asarray, learn(params, batch))
        np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(gradient[:, :-1], expected["grad_values"], atol=1e-6)
        np.testing.assert_allclose(metrics["values/clip_fraction"], expected["clipfrac"], atol=1e-6)
        chosen = np.array(x["mask"]) > 0
        np.testing.assert_allclose(metrics["values"], np.array(x["values"])[chosen].mean(), rtol=1e-6)
        right = {name: np.roll(params, 1, axis=1) for name in ("old_values", "returns")}
        (_, metrics), _ = learn(params, batch._replace(**right))
        assert metrics["values/clip_fraction"] == 0  # nothing to learn is not a gradient taken away


@pytest.mark.parametrize("make_loss", [ppo.make_value_loss, ppo.make_shared_loss])
def test_a_critic_without_a_head_is_refused(make_loss):
    model, params = small()
    batch = problems(small)["ppo"].batch
    with pytest.raises(ValueError, match=r"no scalar head.*with_score\(model\)"):
        jax.eval_shape(make_loss(model), params, batch, None, {})
    with pytest.raises(ValueError, match=r"got parameters \['down', 'embed', .*expected 'backbone' and 'score'"):
        jax.eval_shape(make_loss(models.with_score(model)), params, batch, None, {})


@pytest.mark.parametrize("name", ["old_logp", "advantages"])
def test_a_batch_of_another_shape_is_refused(name):
    model, params = small()
    batch = problems(small)["ppo"].batch
    batch = batch._replace(**{name: getattr(batch, name)[:, 1:]})
    with pytest.raises(Exception, match=r"shape|type"):
        jax.eval_shape(ppo.make_loss(model), params, batch, None, {})
