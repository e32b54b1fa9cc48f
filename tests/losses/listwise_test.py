"""What is particular to losses over K candidates: orders, ties, pairs as the case K = 2."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, by_position, ranks, real
from references import listwise as references

from alignax import losses
from alignax.types import Response


def tied(rng, shape, scale):
    """Ranks of which some are equal, and none need be 1."""
    return rng.integers(2, 5, shape).astype(np.int32)


def a_candidate(rng, shape, scale):
    """Any of the candidates, valid or not."""
    return rng.integers(0, 6, shape).astype(np.int32)


# Candidates stand on the axis of tokens, so that the properties of masks and padding are those of `valid`.
SCORES = {"scores": Input(mask="valid", differentiable=True, make=real)}
RANKED = SCORES | {"ranks": Input(mask="valid", make=ranks)}
TIED = SCORES | {"ranks": Input(mask="valid", make=tied)}
RATED = SCORES | {"rewards": Input(mask="valid", make=real)}
VALID = np.ones((2, 2), bool)


def responses(x):
    """A side of two pairs, from its log-ratios."""
    return Response(x[:, None], jnp.zeros((2, 1)), jnp.ones((2, 1)))


def test_two_candidates_are_a_pair():
    log9 = math.log(9)

    @jax.jit
    def both():
        """Names -> (of lists, of pairs)."""
        scores, order, valid = jnp.array([[1.5, -0.5], [0.3, 2.0]]), jnp.array([[1, 2], [2, 1]]), jnp.asarray(VALID)
        chosen, rejected = jnp.array([1.5, 2.0]), jnp.array([-0.5, 0.3])
        expected = losses.bradley_terry(chosen, rejected)
        pair = losses.dpo(responses(chosen), responses(rejected), beta=0.7)
        apart = jnp.array([[100.0, 0.0], [0.0, 100.0]])
        # a probability of 1 - eps is label smoothing
        smoothed = losses.dpo(responses(chosen), responses(rejected), beta=0.7, label_smoothing=0.1)
        odds = jnp.array([[log9, 0.0], [0.0, log9]])
        return {
            "plackett_luce": (losses.plackett_luce(scores, order, valid), expected),
            "kwise": (losses.kwise(scores, order, valid), expected),
            "best_of_k": (losses.best_of_k(scores, jnp.array([0, 1]), valid), expected),
            "plackett_luce_dpo": (losses.plackett_luce_dpo(scores, order, valid, beta=0.7), pair),
            "infonca": (losses.infonca(scores, apart, valid, beta=0.7), pair),
            "infonca, cold": (losses.infonca(scores, apart / 100, valid, beta=0.7, temperature=0.01), pair),
            "infonca, smoothed": (losses.infonca(scores, odds, valid, beta=0.7), smoothed),
        }

    for name, (of_lists, of_pairs) in both().items():
        np.testing.assert_allclose(of_lists, of_pairs, rtol=1e-6, err_msg=name)


def test_equal_scores_cost_the_logarithm_of_the_number_of_orders():
    @jax.jit
    def costs(scores, order, valid):
        in_order = [losses.plackett_luce(scores, order, valid, top=top)[0] for top in (None, 2, 1)]
        return [*in_order, losses.kwise(scores, order, valid)[0]]

    order, valid = np.array([[3, 1, 2, 9]]), np.array([[True, True, True, False]])
    found = costs(np.float32([[2, 2, 2, np.nan]]), order, valid)
    np.testing.assert_allclose(found, np.log([6, 6, 3, 2]), rtol=1e-6)


def test_probabilities_of_all_orders_add_up_to_1():
    scores = np.tile(np.float32([0.3, -1.0, 2.0]), (6, 1))
    orders = np.array([[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]])
    costs = jax.jit(losses.plackett_luce)(scores, orders, np.ones((6, 3), bool))
    np.testing.assert_allclose(np.sum(np.exp(-np.array(costs))), 1.0, rtol=1e-6)


LISTS = {
    "kwise": (losses.kwise, "ranks"),
    "plackett_luce": (losses.plackett_luce, "ranks"),
    "plackett_luce_dpo": (losses.plackett_luce_dpo, "ranks"),
    "infonca": (losses.infonca, "rewards"),
    "nca": (losses.nca, "rewards"),
    "exo_reward": (losses.exo_reward, "rewards"),
}


@pytest.mark.parametrize("name", LISTS)
def test_the_order_of_the_candidates_does_not_matter_and_constants_do_not_learn(name):
    loss, kind = LISTS[name]
    rng = np.random.default_rng(0)
    scores, valid = rng.normal(size=(3, 5)).astype(np.float32), rng.random((3, 5)) < 0.8
    other = rng.integers(1, 4, (3, 5)) if kind == "ranks" else rng.normal(size=(3, 5)).astype(np.float32)
    order = rng.permutation(5)

    @jax.jit
    def run(scores, other, valid):
        """Values, and gradients by the scores and by the rewards."""
        moving = (scores, other) if kind == "rewards" else (scores,)
        value, pull = jax.vjp(lambda scores, other=other: loss(scores, other, valid), *moving)
        return value, *pull(jnp.ones_like(value))

    expected, gradient, *constant = jax.tree.map(np.asarray, run(scores, other, valid))
    permuted, permuted_gradient, *_ = run(scores[:, order], other[:, order], valid[:, order])
    np.testing.assert_allclose(permuted, expected, rtol=1e-6)
    np.testing.assert_allclose(permuted_gradient, gradient[:, order], rtol=1e-5, atol=1e-7)
    assert np.any(gradient != 0) and not np.any(gradient[~valid])
    assert len(constant) == (kind == "rewards")
    for slope in constant:
        np.testing.assert_array_equal(slope, 0.0)


def test_the_least_loss_is_where_the_policy_is_the_target():
    rewards, valid = np.float32([[1.0, -1.0, 0.5]]), np.ones((1, 3), bool)
    # NCA also says how large: softmax(reward)_k sigmoid(-r) = sigmoid(r) / K
    best = np.log(3 * np.exp(rewards) / np.exp(rewards).sum())

    @jax.jit
    def run(rewards, best, valid):
        targets = {losses.infonca: rewards / 0.1 + 7, losses.exo_reward: rewards / 0.1 + 7, losses.nca: best / 0.1}
        return losses.exo_reward(rewards / 0.1 + 7, rewards, valid), [
            jax.grad(lambda x, loss=loss: jnp.sum(loss(x, rewards, valid, beta=0.1)))(x) for loss, x in targets.items()
        ]

    least, gradients = run(rewards, best, valid)
    np.testing.assert_allclose(least, [0.0], atol=1e-6)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_an_unknown_best_costs_nothing():
    valid, best = np.array([[True, False]] * 3), np.array([1, 5, 0])

    @jax.jit
    def run(scores, best, valid):
        value, pull = jax.vjp(lambda s: losses.best_of_k(s, best, valid), scores)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = run(np.float32([[1, 2]] * 3), best, valid)
    np.testing.assert_array_equal(value, 0.0)
    np.testing.assert_array_equal(gradient, 0.0)


def test_refusals():
    scores, order, valid = (jnp.asarray(x) for x in (np.zeros((2, 2), np.float32), np.array([[1, 2], [2, 1]]), VALID))
    with pytest.raises(ValueError, match="plackett_luce: top=0; expected 1 or more, or None for all"):
        losses.plackett_luce(scores, order, valid, top=0)
    for loss, name in (
        (losses.infonca, "temperature"),
        (losses.nca, "temperature"),
        (losses.exo_reward, "reward_temperature"),
    ):
        with pytest.raises(ValueError, match=f"{loss.__name__}: {name}=0; expected {name} > 0"):
            loss(scores, scores, valid, **{name: 0})
    for loss in (losses.plackett_luce_dpo, losses.infonca, losses.nca, losses.exo_reward):
        with pytest.raises(ValueError, match=f"{loss.__name__}: beta=-1; expected beta > 0"):
            loss(scores, scores, valid, beta=-1)


def ranked(loss):
    return by_position(loss, "scores", "ranks", "valid")


def rated(loss):
    return by_position(loss, "scores", "rewards", "valid")


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "kwise": Row(losses.kwise, ranked(losses.kwise), references.kwise, TIED),
        "plackett_luce": Row(losses.plackett_luce, ranked(losses.plackett_luce), references.plackett_luce, RANKED),
        "plackett_luce_top": Row(
            losses.plackett_luce,
            lambda x, top=2: losses.plackett_luce(x["scores"], x["ranks"], x["valid"], top=top),
            lambda x, top=2: references.plackett_luce(x, top),
            TIED,
            {"top": 3.0},
        ),
        "best_of_k": Row(
            losses.best_of_k,
            by_position(losses.best_of_k, "scores", "best", "valid"),
            references.best_of_k,
            SCORES | {"best": Input("B", mask=None, make=a_candidate)},
        ),
        "plackett_luce_dpo": Row(
            losses.plackett_luce_dpo,
            ranked(losses.plackett_luce_dpo),
            references.plackett_luce_dpo,
            TIED,
            {"beta": 0.3},
        ),
        "infonca": Row(
            losses.infonca, rated(losses.infonca), references.infonca, RATED, {"beta": 0.3, "temperature": 0.5}
        ),
        "nca": Row(losses.nca, rated(losses.nca), references.nca, RATED, {"beta": 0.3, "temperature": 0.5}),
        "exo_reward": Row(
            losses.exo_reward,
            rated(losses.exo_reward),
            references.exo_reward,
            RATED,
            {"beta": 0.3, "reward_temperature": 0.7},
        ),
    }
