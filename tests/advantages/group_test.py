"""What is particular to advantages within a group: closed forms, rewards that are missing, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, by_position, probability, real
from references import advantages as references

from alignax import advantages, reduce

REWARDS = {"rewards": Input("B K", None, make=real)}
GROUP = {
    f.__name__: f
    for f in (
        advantages.group_relative,
        advantages.group_relative_batch,
        advantages.group_centred,
        advantages.leave_one_out,
    )
}
HYPER = {"group_relative": {"eps": 0.3, "ddof": 0.5}, "group_relative_batch": {"eps": 0.3, "ddof": 0.5}}


class TestRows(Properties):
    rows = {  # noqa: RUF012
        name: Row(f, by_position(f, "rewards"), getattr(references, name), REWARDS, HYPER.get(name, {}))
        for name, f in GROUP.items()
    }
    rows["group_relative_batch"] = rows["group_relative_batch"]._replace(coupled=True)
    rows["opo"] = Row(
        advantages.opo,
        by_position(advantages.opo, "rewards", "lengths"),
        references.opo,
        REWARDS | {"lengths": Input("B K", None, make=probability)},
    )


@pytest.mark.parametrize("name", [*GROUP, "opo"])
def test_an_answer_without_a_reward_is_left_out(name):
    rewards = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    rewards[0, 1] = rewards[1, :3] = rewards[2] = rewards[4, 0] = np.nan
    x = {"rewards": rewards, "lengths": np.arange(1, 21, dtype=np.float32).reshape(5, 4)}
    row = TestRows.rows[name]
    result = jax.jit(row.call)({n: jnp.asarray(v) for n, v in x.items()})
    np.testing.assert_allclose(result, row.reference(x), rtol=1e-5, atol=1e-6)
    assert not np.any(np.asarray(result)[np.isnan(rewards)])


def test_leave_one_out_is_shift_invariant_and_a_multiple_of_the_centred():
    rewards = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    run = jax.jit(advantages.leave_one_out)
    result = np.asarray(run(rewards))
    np.testing.assert_allclose(run(rewards + np.float32(32)), result, atol=1e-5)
    np.testing.assert_allclose(result, 5 / 4 * (rewards - np.mean(rewards, axis=1, keepdims=True)), atol=1e-6)
    np.testing.assert_allclose(np.sum(result, axis=1), np.zeros(6), atol=1e-5)


def test_of_two_answers_leave_one_out_gives_the_difference():
    np.testing.assert_array_equal(jax.jit(advantages.leave_one_out)(np.float32([[1.0, 3.5]])), [[-2.5, 2.5]])


def test_opo_weighs_by_length():
    # lengths 3 and 1: the baseline is three quarters of the way to the longer answer's reward
    run = jax.jit(advantages.opo)
    result = run(np.float32([[1, 0]]), np.array([[3, 1]]))
    np.testing.assert_allclose(result, [[0.25, -0.75]], rtol=1e-6)
    empty = run(np.float32([[1, 0]]), np.zeros((1, 2), int))  # nothing was said: any baseline will do
    np.testing.assert_allclose(empty, [[0.5, -0.5]], rtol=1e-6)


def test_informative_groups():
    nan = np.nan
    rewards = np.float32(
        [[1.0, 0.0, 1.0], [0.5, 0.5, 0.5], [nan, nan, nan], [nan, 2.0, 2.0], [nan, 2.0, 1.0], [3, nan, nan]]
    )

    @jax.jit
    def run(rewards, weights):
        found = advantages.informative_groups(rewards)
        return found, reduce.batch_mean(1.0 - found, weights).value()

    found, fraction = run(rewards, np.float32([1, 1, 0, 0, 1, 1]))
    np.testing.assert_array_equal(found, [True, False, False, False, True, False])
    # what the docstring promises: the fraction without spread, over the groups that count
    np.testing.assert_allclose(fraction, 0.5)


@functools.cache
def without_spread():
    """Advantages of the first two groups, and which of the three teach something; compiled once."""

    @jax.jit
    def run(mixed, lengths):
        found = {
            "group_relative": advantages.group_relative(mixed[:2], eps=0.0),
            "leave_one_out": advantages.leave_one_out(mixed[:2]),
            "opo": advantages.opo(mixed[:2], lengths),
            "group_relative_batch": advantages.group_relative_batch(mixed, eps=1e-9)[:2],
        }
        return found, advantages.informative_groups(mixed)

    return run


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e8])
def test_a_group_without_spread_has_advantage_exactly_0(reward):
    mixed, lengths = np.full((3, 7), reward, np.float32), np.arange(1, 15, dtype=np.float32).reshape(2, 7)
    mixed[2] = np.arange(7)
    found, informative = without_spread()(mixed, lengths)
    for name, advantage in found.items():
        np.testing.assert_array_equal(advantage, np.zeros((2, 7)), err_msg=name)
    np.testing.assert_array_equal(informative, [False, False, True])


def test_large_rewards_that_differ_little():
    rewards = np.float32([[1e6, 1e6, 1e6 + 0.0625, 1e6]])
    np.testing.assert_allclose(
        jax.jit(advantages.group_centred)(rewards), [[-1 / 64, -1 / 64, 3 / 64, -1 / 64]], rtol=1e-6
    )


def test_a_group_of_one_is_refused():
    one = jnp.ones((3, 1))
    for name, function in {**GROUP, "informative_groups": advantages.informative_groups}.items():
        with pytest.raises(ValueError, match=rf"{name}: rewards of shape \(3, 1\).*at least 2 samples"):
            function(one)
    with pytest.raises(ValueError, match=r"opo: .*at least 2 samples"):
        advantages.opo(one, one)
