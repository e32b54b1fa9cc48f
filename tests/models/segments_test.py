"""Positions and visibility of packed rows against a loop over tokens, and three rows written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import transformer as reference

from alignax.models import segment_positions, segment_visibility
from alignax.models.segments import within_window

# A prompt (1) with two completions (2, 3), then a part of its own (4), then padding.
SEGMENTS = [1, 1, 1, 2, 2, 3, 3, 3, 4, 0]
PARENTS = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0]


def arrays(*rows):
    return [jnp.asarray([row], jnp.int32) for row in rows]


def test_positions_by_hand():
    segments, parents = arrays(SEGMENTS, PARENTS)
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 0, 0]]
    assert segment_positions(segments, parents).tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 0]]


def test_visibility_by_hand():
    visible = segment_visibility(*arrays(SEGMENTS, PARENTS))[0].astype(int)
    assert visible[4].tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert visible[6].tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 0, 0]
    assert visible[8].tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert visible[9].tolist() == [0] * 10


@pytest.mark.parametrize("seed", range(4))
def test_against_the_loop(seed):
    rng = np.random.default_rng(seed)
    segments = np.repeat(np.arange(1, 6), rng.integers(1, 5, 5))
    segments = np.concatenate([segments, np.zeros(3, int)])
    parents = np.where(segments > 2, rng.integers(0, 3, 6)[segments], 0)
    found = jax.jit(segment_positions)(*arrays(segments, parents))[0]
    visible = segment_visibility(*arrays(segments, parents))[0]
    positions, sees = reference.layout(segments.tolist(), parents.tolist())
    assert found.tolist() == positions
    assert [np.flatnonzero(row).tolist() for row in visible] == [sorted(row) for row in sees]


def test_positions_count_what_came_before_wherever_it_stands():
    """Parts in pieces, ids in any order, and parents that no token has."""
    rng = np.random.default_rng(9)
    segments, parents = rng.integers(0, 5, (3, 40)) * 7, rng.integers(0, 9, (3, 40)) * 7
    found = segment_positions(jnp.asarray(segments, jnp.int32), jnp.asarray(parents, jnp.int32))
    for row, column in np.ndindex(3, 40):
        before = np.sum(segments[row, :column] == segments[row, column])
        parent = parents[row, column]
        expected = before + np.sum(segments[row] == parent) * (parent != 0)
        assert found[row, column] == (0 if segments[row, column] == 0 else expected)


def test_positions_make_no_square():
    row = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    compiled = jax.jit(segment_positions).lower(row, row).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 1024 * 1024  # a square of booleans


@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
def test_a_window_counts_positions_not_columns(window):
    """A completion's window reaches into its prompt, however far away that stands in the row."""
    segments, parents = arrays(SEGMENTS, PARENTS)
    positions = segment_positions(segments, parents)
    found = within_window(segment_visibility(segments, parents), positions, positions, window)[0]
    places, sees = reference.layout(SEGMENTS, PARENTS)
    for i, seen in enumerate(sees):
        assert np.flatnonzero(found[i]).tolist() == [
            j for j in sorted(seen) if places[i] - places[j] < (window or 1000)
        ]


def test_a_window_over_the_slots_of_a_cache():
    positions, slots = jnp.array([[5], [2]]), jnp.arange(8)[None].repeat(2, axis=0)
    found = within_window(slots[:, None, :] <= positions[:, :, None], positions, slots, 3)
    assert found[:, 0].astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
