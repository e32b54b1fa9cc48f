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
VALID = jnp.ones((2, 2), bool)


def responses(x):
    """A side of two pairs, from its log-ratios."""
    return Response(x[:, None], jnp.zeros((2, 1)), jnp.ones((2, 1)))


def test_two_candidates_are_a_pair():
    scores, order = jnp.array([[1.5, -0.5], [0.3, 2.0]]), jnp.array([[1, 2], [2, 1]])
    chosen, rejected = jnp.array([1.5, 2.0]), jnp.array([-0.5, 0.3])
    expected = losses.bradley_terry(chosen, rejected)
    np.testing.assert_allclose(losses.plackett_luce(scores, order, VALID), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.kwise(scores, order, VALID), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.best_of_k(scores, jnp.array([0, 1]), VALID), expected, rtol=1e-6)
    pair = losses.dpo(responses(chosen), responses(rejected), beta=0.7)
    np.testing.assert_allclose(losses.plackett_luce_dpo(scores, order, VALID, beta=0.7), pair, rtol=1e-6)
    apart = jnp.array([[100.0, 0.0], [0.0, 100.0]])
    np.testing.assert_allclose(losses.infonca(scores, apart, VALID, beta=0.7), pair, rtol=1e-6)
    np.testing.assert_allclose(losses.infonca(scores, apart / 100, VALID, beta=0.7, temperature=0.01), pair, rtol=1e-6)
    # a probability of 1 - eps is label smoothing
    smoothed = losses.dpo(responses(chosen), responses(rejected), beta=0.7, label_smoothing=0.1)
    odds = jnp.array([[math.log(9), 0.0], [0.0, math.log(9)]])
    np.testing.assert_allclose(losses.infonca(scores, odds, VALID, beta=0.7), smoothed, rtol=1e-6)


def test_equal_scores_cost_the_logarithm_of_the_number_of_orders():
    order, valid = jnp.array([[3, 1, 2, 9]]), jnp.array([[True, True, True, False]])
    scores = jnp.array([[2.0, 2.0, 2.0, jnp.nan]])
    np.testing.assert_allclose(losses.plackett_luce(scores, order, valid), [math.log(6)], rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce(scores, order, valid, top=2), [math.log(6)], rtol=1e-6)
    np.testing.assert_allclose(losses.plackett_luce(scores, order, valid, top=1), [math.log(3)], rtol=1e-6)
    np.testing.assert_allclose(losses.kwise(scores, order, valid), [math.log(2)], rtol=1e-6)


def test_probabilities_of_all_orders_add_up_to_1():
    scores = jnp.array([[0.3, -1.0, 2.0]])
    orders = [[1, 2, 3], [1, 3, 2], [2, 1, 3], [2, 3, 1], [3, 1, 2], [3, 2, 1]]
    costs = [losses.plackett_luce(scores, jnp.array([order]), jnp.ones((1, 3), bool))[0] for order in orders]
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
    expected, gradient = jax.vjp(lambda s: loss(s, jnp.asarray(other), jnp.asarray(valid)), jnp.asarray(scores))
    permuted, permuted_gradient = jax.vjp(
        lambda s: loss(s, jnp.asarray(other[:, order]), jnp.asarray(valid[:, order])), jnp.asarray(scores[:, order])
    )
    np.testing.assert_allclose(permuted, expected, rtol=1e-6)
    ones = jnp.ones(3)
    np.testing.assert_allclose(permuted_gradient(ones)[0], gradient(ones)[0][:, order], rtol=1e-5, atol=1e-7)
    assert np.any(gradient(ones)[0] != 0) and not np.any(gradient(ones)[0][~valid])
    if kind == "rewards":
        constant = jax.grad(lambda r: jnp.sum(loss(jnp.asarray(scores), r, jnp.asarray(valid))))(jnp.asarray(other))
        np.testing.assert_array_equal(constant, 0.0)


def test_the_least_loss_is_where_the_policy_is_the_target():
    rewards, valid = jnp.array([[1.0, -1.0, 0.5]]), jnp.ones((1, 3), bool)
    np.testing.assert_allclose(losses.exo_reward(rewards / 0.1 + 7, rewards, valid), [0.0], atol=1e-6)
    for loss in (losses.infonca, losses.exo_reward):
        gradient = jax.grad(lambda x, loss=loss: jnp.sum(loss(x, rewards, valid, beta=0.1)))(rewards / 0.1 + 7)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-7)
    # NCA also says how large: softmax(reward)_k sigmoid(-r) = sigmoid(r) / K
    best = jnp.log(3 * jax.nn.softmax(rewards))
    gradient = jax.grad(lambda x: jnp.sum(losses.nca(x, rewards, valid, beta=0.1)))(best / 0.1)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_an_unknown_best_costs_nothing():
    scores, valid = jnp.array([[1.0, 2.0]] * 3), jnp.array([[True, False]] * 3)
    found, gradient = jax.vjp(lambda s: losses.best_of_k(s, jnp.array([1, 5, 0]), valid), scores)
    np.testing.assert_array_equal(found, 0.0)
    np.testing.assert_array_equal(gradient(jnp.ones(3))[0], 0.0)


def test_refusals():
    scores, order = jnp.zeros((2, 2)), jnp.array([[1, 2], [2, 1]])
    with pytest.raises(ValueError, match="plackett_luce: top=0; expected 1 or more, or None for all"):
        losses.plackett_luce(scores, order, VALID, top=0)
    for loss, name in (
        (losses.infonca, "temperature"),
        (losses.nca, "temperature"),
        (losses.exo_reward, "reward_temperature"),
    ):
        with pytest.raises(ValueError, match=f"{loss.__name__}: {name}=0; expected {name} > 0"):
            loss(scores, scores, VALID, **{name: 0})
    for loss in (losses.plackett_luce_dpo, losses.infonca, losses.nca, losses.exo_reward):
        with pytest.raises(ValueError, match=f"{loss.__name__}: beta=-1; expected beta > 0"):
            loss(scores, order.astype(jnp.float32), VALID, beta=-1)


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
