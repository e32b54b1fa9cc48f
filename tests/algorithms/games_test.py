"""Small games whose answer is known: what self-play and online losses approach, and whether gradients are the game's.

Every expectation is exact: all answers, or all pairs of them, are rows of a batch, weighted by how probable they are.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses, models
from alignax.types import Response

# of spec/vectors_online.json: V177's game without a pure answer, and V174's bandit
GAME = np.array([[0.5, 0.7, 0.2], [0.3, 0.5, 0.9], [0.8, 0.1, 0.5]], np.float32)
REFERENCE, TAU = np.array([0.6, 0.3, 0.1], np.float32), 0.1
REGULARISED_NASH = np.array([0.5497, 0.242151, 0.208149])
NASH = np.array([4, 3, 2]) / 9  # of the game itself: (P - 1/2) p = 0
ARMS = {"reference": np.float32([0.5, 0.3, 0.2]), "reward": np.float32([1.0, 0.0, 2.0]), "beta": 0.5}
OPTIMUM = np.array([0.24772, 0.020115, 0.732165])


def mixed(logp, reference, weight):
    """log of policy^(1 - weight) reference^weight, normalised."""
    return jax.nn.log_softmax(models.geometric_mixture_logits(logp, jnp.log(reference), mix=weight))


def run(step, start, steps):
    """All iterates of `start, step(start, 0), ...`, compiled."""

    def body(x, t):
        new = step(x, t)
        return new, new

    return jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(steps)))(jnp.asarray(start))[1]


def pairs(logits, reference, preferences):
    """All pairs of answers of one token each."""
    size = len(reference)
    first, second = (jnp.asarray(x) for x in np.array(list(itertools.product(range(size), repeat=2))).T)
    logp, ref_logp = jax.nn.log_softmax(logits), jnp.log(reference)

    def side(y, p):
        return Response(logp[y][:, None], ref_logp[y][:, None], jnp.ones((size**2, 1)), {"preference": p})

    p = jnp.asarray(preferences)[first, second]
    return side(first, p), side(second, 1 - p), first, second


def expected_loss(loss, logits, sampler, reference, preferences):
    """Over two answers of `sampler`, log-probabilities that are a constant."""
    one, other, first, second = pairs(logits, reference, preferences)
    weights = jnp.exp(jax.lax.stop_gradient(sampler[first] + sampler[second]))
    return jnp.sum(weights * loss(one, other))


def descend(loss, reference, preferences, *, weight=0.0, steps=3000, rate=0.1):
    """The policy after steps down the expected gradient on pairs of its own mixture with the reference."""

    def step(logits, t):
        sampler = mixed(jax.nn.log_softmax(logits), reference, weight)
        gradient = jax.grad(lambda x: expected_loss(loss, x, sampler, reference, preferences))(logits)
        # by the policy: without, the probability of an answer falls faster than what is left to learn about it
        return logits - rate * gradient / jax.nn.softmax(logits)

    return jax.nn.softmax(run(step, jnp.log(reference), steps)[-1])


def test_nash_md_reaches_the_regularised_nash_point():
    """With steps eta_t = 2 / (tau (t + 2)); a constant step stays O(eta) away."""

    def step(eta, logp):
        opponent = mixed(logp, REFERENCE, eta * TAU)
        return jax.nn.log_softmax(opponent + eta * jnp.asarray(GAME) @ jnp.exp(opponent))

    start = jnp.log(REFERENCE)
    logps = run(lambda logp, t: step(2 / (TAU * (t + 2)), logp), start, 2000)
    kl = np.sum(REGULARISED_NASH * (np.log(REGULARISED_NASH) - np.asarray(logps)), axis=1)
    assert kl[19] > 5 * kl[99] and kl[99] > 5 * kl[499]  # at least as 1 / T
    np.testing.assert_allclose(np.exp(logps[-1]), REGULARISED_NASH, atol=3e-4)
    constant = np.exp(run(lambda logp, t: step(0.5, logp), start, 2000)[-1])
    assert np.max(np.abs(constant - REGULARISED_NASH)) > 5e-3


def test_sppo_plays_nash_on_average():
    """Every iteration ends where the loss is zero, up to the normaliser; the average of the policies is the answer."""
    eta = 0.05

    def target(logp):
        return logp + eta * (jnp.asarray(GAME) @ jnp.exp(logp) - 0.5)

    start = jnp.log(REFERENCE)
    rate, ones = jnp.asarray(GAME) @ jnp.exp(start), jnp.ones((3, 1))
    best = Response(target(start)[:, None], start[:, None], ones, {"win_rate": rate})
    np.testing.assert_allclose(losses.sppo(best, best, beta=1 / eta), 0.0, atol=1e-9)
    worse = best._replace(logp=best.logp + 0.1)
    assert np.all(losses.sppo(worse, best, beta=1 / eta) > 1e-3)

    policies = np.exp(run(lambda logp, t: jax.nn.log_softmax(target(logp)), start, 20_000))
    np.testing.assert_allclose(policies.mean(axis=0), NASH, atol=5e-3)
    assert np.max(np.abs(policies[-1] - NASH)) > 0.1  # it goes round in circles


def test_the_gradient_of_online_ipo_is_that_of_self_play():
    """-4 / tau times the gradient of P(pi > pi') - tau KL(pi || ref), pi' the policy held still."""
    logits = jnp.array([0.3, -0.5, 0.9])
    still = jax.nn.log_softmax(logits)

    def loss(one, other):
        return losses.ipo_soft(one, other, beta=TAU)

    def value(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.exp(logp) @ (GAME @ jnp.exp(still) - TAU * (logp - jnp.log(REFERENCE)))

    found = jax.grad(lambda x: expected_loss(loss, x, still, REFERENCE, GAME))(logits)
    np.testing.assert_allclose(found, -4 / TAU * jax.grad(value)(logits), rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_ipo_md_reaches_the_best_answer_to_its_mixture(weight):
    """pi is proportional to ref exp(P(y > mixture) / tau); without a mixture that is the regularised Nash point."""
    found = descend(lambda *x: losses.ipo_soft(*x, beta=TAU), REFERENCE, GAME, weight=weight, steps=4000, rate=0.05)
    mixture = np.asarray(found, np.float64) ** (1 - weight) * REFERENCE**weight
    answer = REFERENCE * np.exp(GAME @ (mixture / mixture.sum()) / TAU)
    np.testing.assert_allclose(found, answer / answer.sum(), atol=1e-4)
    assert np.allclose(found, REGULARISED_NASH, atol=1e-4) == (weight == 0)


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_online_dpo_approaches_the_optimum_of_the_bandit(labels):
    """Labels of Bradley and Terry's model, as they are or drawn: ref exp(r / beta)."""
    reward, beta = ARMS["reward"], ARMS["beta"]
    preferences = 1 / (1 + np.exp(reward[None] - reward[:, None]))

    def soft(one, other):
        return losses.dpo_soft(one, other, beta=beta)

    def hard(one, other):
        p = one.extra["preference"]
        return p * losses.dpo(one, other, beta=beta) + (1 - p) * losses.dpo(other, one, beta=beta)

    found = descend({"soft": soft, "hard": hard}[labels], ARMS["reference"], preferences)
    np.testing.assert_allclose(found, OPTIMUM, atol=2e-4)


@pytest.mark.parametrize("loss", [losses.nash_md, losses.nash_md_sequence, losses.nash_md_trl])
def test_the_policy_gradient_is_the_gradient_of_the_game(loss):
    """Answers of two tokens, so that it matters what a token answers for: TRL's form is biased."""
    rng, size, tau = np.random.default_rng(0), 3, 0.7
    params = {"first": jnp.asarray(rng.normal(size=3)), "second": jnp.asarray(rng.normal(size=(3, 3)))}
    reference = {name: jnp.asarray(rng.normal(size=x.shape)) for name, x in params.items()}
    a, b = (jnp.asarray(x) for x in np.array(list(itertools.product(range(size), repeat=2))).T)
    wins = jnp.asarray(rng.uniform(size=9))  # of each answer, against the opponent

    def logp(params):
        return jnp.stack([jax.nn.log_softmax(params["first"])[a], jax.nn.log_softmax(params["second"])[a, b]], axis=1)

    def value(params):
        rows, ref = jnp.sum(logp(params), axis=1), jnp.sum(logp(reference), axis=1)
        return jnp.exp(rows) @ (wins - tau * (rows - ref))

    def expected(params):
        rows = logp(params)
        weights = jax.lax.stop_gradient(jnp.exp(jnp.sum(rows, axis=1)))
        return weights @ jnp.sum(loss(rows, logp(reference), wins, jnp.ones((9, 2)), kl_weight=tau), axis=1)

    found, wanted = jax.jit(jax.grad(expected))(params), jax.grad(value)(params)
    same = all(np.allclose(-found[name], wanted[name], atol=1e-5) for name in params)
    assert same == (loss is not losses.nash_md_trl)
