"""Rotary positions against the formulas, frequency by frequency."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import transformer as reference

from alignax.models import rope

POSITIONS = np.array([[0, 1, 7, 300], [5, 5, 0, 8191]])


@pytest.mark.parametrize(
    "scaling, expected",
    [
        (None, reference.frequencies(64, 5e5)),
        (rope.LinearScaling(factor=4.0), reference.frequencies(64, 5e5) / 4),
        (
            rope.Llama3Scaling(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0),
            reference.llama3_frequencies(64, 5e5, factor=32, low=1, high=4, original=8192),
        ),
    ],
)
def test_angles(scaling, expected):
    found = rope.angles(jnp.asarray(POSITIONS), head_dim=64, theta=5e5, scaling=scaling)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, POSITIONS[:, :, None] * expected, rtol=3e-7)


def test_llama3_has_all_three_bands():
    plain = reference.frequencies(64, 5e5)
    ratio = rope.Llama3Scaling(factor=8.0)(plain) / plain
    kept, stretched = np.sum(ratio == 1), np.sum(ratio == 1 / 8)
    assert kept > 0 and stretched > 0 and kept + stretched < len(plain)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 5e-7), (jnp.bfloat16, 2e-2)])
def test_rotate_turns_pairs_of_halves(key, dtype, tolerance):
    x = jax.random.normal(key, (2, 4, 3, 8)).astype(dtype)
    found = rope.rotate(x, rope.angles(jnp.asarray(POSITIONS), head_dim=8, theta=100.0))
    assert found.dtype == dtype
    for row, column, head in np.ndindex(2, 4, 3):
        position = POSITIONS[row, column]
        expected = reference.rotated(
            np.asarray(x[row, column, head], np.float64), position, reference.frequencies(8, 100.0)
        )
        atol = 3 * (tolerance + position * 1e-7)  # an angle in float32 is off by half an ulp of itself
        np.testing.assert_allclose(found[row, column, head].astype(jnp.float32), expected, atol=atol)


def test_channels_without_an_angle_stay(key):
    x = jax.random.normal(key, (2, 4, 3, 8))
    angle = rope.angles(jnp.asarray(POSITIONS), head_dim=4, theta=100.0)
    found = rope.rotate(x, angle)
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(found[..., :4], rope.rotate(x[..., :4], angle))
    np.testing.assert_array_equal(rope.rotate(x, jnp.zeros((2, 4, 4))), x)
