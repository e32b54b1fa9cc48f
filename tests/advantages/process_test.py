"""Advantages from rewards of steps: equality with the loop, steps that are missing, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties import Input, Properties, Row, boolean, by_position, real
from references import advantages as references

from alignax import advantages


def columns(rng, shape, scale):
    """Ends of steps, some of them behind the row."""
    return rng.integers(0, 8, shape).astype(np.int32)


class TestRows(Properties):
    rows = {  # noqa: RUF012
        "group_relative_process": Row(
            advantages.group_relative_process,
            by_position(advantages.group_relative_process, "rewards", "ends", "mask"),
            references.group_relative_process,
            {
                "rewards": Input("B K V", None, make=real),
                "ends": Input("B K V", None, make=columns),
                "mask": Input("B K T", None, make=boolean),
            },
            {"eps": 0.2, "ddof": 0.5},
            rtol=5e-6,
        )
    }

    def test_bad_shapes_are_refused(self, row):
        x = {
            "rewards": np.ones((4, 3, 5), np.float32),
            "ends": np.ones((4, 3, 5), np.int32),
            "mask": np.ones((4, 3, 6)),
        }
        for name in x:
            for bad in (x[name][:, :-1], x[name][0]):
                with pytest.raises(Exception, match=r"rank|shape|type"):
                    jax.eval_shape(row.call, {**x, name: bad})


def test_missing_steps_padding_and_a_group_of_one():
    rng = np.random.default_rng(0)
    rewards, ends = rng.normal(size=(2, 3, 4)).astype(np.float32), np.tile(np.int32([1, 2, 4, 6]), (2, 3, 1))
    rewards[0, 0, 2:] = rewards[0, 1] = rewards[1] = np.nan
    x = {"rewards": rewards, "ends": ends, "mask": rng.random((2, 3, 7)) < 0.7}
    result = jax.jit(advantages.group_relative_process)(*x.values())
    np.testing.assert_allclose(result, references.group_relative_process(x), rtol=1e-5, atol=1e-6)
    result = np.asarray(result)
    assert not np.any(result[0, 1]) and not np.any(result[1]) and not np.any(result[0, 0, 3:])
    with pytest.raises(ValueError, match=r"group_relative_process: .*at least 2 samples"):
        advantages.group_relative_process(*(jnp.asarray(value[:, :1]) for value in x.values()))


def test_one_step_at_the_end_is_group_relative():
    rewards, ends, mask = np.float32([[1, 0, 0, 1]]), np.full((1, 4, 1), 4), np.ones((1, 4, 5), np.float32)

    @jax.jit
    def run(rewards, ends, mask):
        steps = advantages.group_relative_process(rewards[..., None], ends, mask)
        return steps, advantages.group_relative(rewards)

    steps, expected = jax.tree.map(np.asarray, run(rewards, ends, mask))
    np.testing.assert_array_equal(steps, np.broadcast_to(expected[..., None], steps.shape))
