"""Settings of rows: a row of a mixed batch is the row of a batch where all are like it, in one compiled program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import toys

from alignax.sampling import generate

PROMPTS = jnp.array([[1, 2, 3, 4, 5], [6, 1, 0, 0, 0], [3, 0, 0, 0, 0]], jnp.int32)
LENGTHS = jnp.array([5, 3, 1], jnp.int32)
ROWS = 6  # three prompts in groups of two
OFF = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "max_tokens": 8,
    "eos_ids": (-1, -1),
    "forbidden": (-1, -1),
    "stop": ((-1, -1), (-1, -1)),
}
VALUES = {
    "temperature": (1.0, 0.0, 2.0, 0.3, 1.0, 0.7),
    "top_k": (0, 1, 2, 3, 100, 0),
    "top_p": (1.0, 0.1, 0.5, 0.8, 1.0, 0.9),
    "min_p": (0.0, 1.0, 0.5, 0.2, 1e-9, 0.0),
    "repetition_penalty": (1.0, 5.0, 0.2, 1.5, 1.0, 2.0),
    "max_tokens": (8, 1, 2, 3, 8, 5),
    "eos_ids": ((-1, -1), (0, 1), (2, -1), (-1, 3), (4, 5), (6, 0)),
    "forbidden": ((-1, -1), (0, 1), (2, -1), (-1, 3), (4, 4), (6, 99)),
    "stop": (
        ((-1, -1), (-1, -1)),
        ((-1, 4), (-1, 0)),
        ((1, 2), (3, 4)),
        ((5, 5), (-1, -1)),
        ((-1, -1), (-1, 3)),
        ((0, 6), (-1, 6)),
    ),
}


def spread(values):
    """Every setting as an array that leads with the rows."""
    dtypes = {name: np.asarray(off).dtype for name, off in OFF.items()}
    given = {name: [off] * ROWS for name, off in OFF.items()} | values
    kinds = {"f": jnp.float32, "i": jnp.int32}
    return {name: jnp.asarray(value, kinds[dtypes[name].kind]) for name, value in given.items()}


@functools.cache
def sampler():
    """Everything but the counts is traced."""
    model, _, _ = toys.history()
    return jax.jit(functools.partial(generate, model, max_new_tokens=8, group=2))


def sample(values, key):
    return sampler()(toys.history()[1], PROMPTS, LENGTHS, key, **spread(values))


def assert_row(mixed, same, row):
    np.testing.assert_array_equal(mixed.tokens[row], same.tokens[row])
    for name in ("mask", "segments", "lengths", "truncated"):
        np.testing.assert_array_equal(getattr(mixed, name)[row], getattr(same, name)[row])
    np.testing.assert_allclose(mixed.logp[row], same.logp[row], atol=1e-6)
    np.testing.assert_allclose(mixed.processed_logp[row], same.processed_logp[row], atol=1e-6)


@pytest.mark.parametrize("names", [*((name,) for name in VALUES), tuple(VALUES)], ids=lambda names: "-".join(names))
def test_a_row_of_a_mixed_batch_is_the_row_where_all_are_like_it(names, key):
    mixed = sample({name: VALUES[name] for name in names}, key)
    plain, changed = sample({}, key), 0
    for row in range(ROWS):
        assert_row(mixed, sample({name: [VALUES[name][row]] * ROWS for name in names}, key), row)
        changed += mixed.tokens[row].tolist() != plain.tokens[row].tolist()
    assert changed >= 2  # the setting does something


def test_one_value_for_all_rows_is_an_array_of_it(key):
    model, params, _ = toys.history()
    one = {name: values[3] for name, values in VALUES.items()} | {"eos_ids": (3,), "forbidden": (3,), "stop": ((5, 5),)}
    found = jax.jit(functools.partial(generate, model, max_new_tokens=8, group=2, **one))(params, PROMPTS, LENGTHS, key)
    expected = sample({name: [values[3]] * ROWS for name, values in VALUES.items()}, key)
    for row in range(ROWS):
        assert_row(expected, found, row)
    arrays = {"eos_ids": jnp.array([3]), "forbidden": jnp.array([-1, 3]), "stop": jnp.array([[5, 5]])}
    numbers = {name: jnp.asarray(value) for name, value in one.items() if name not in arrays}
    outside = generate(model, params, PROMPTS, LENGTHS, key, max_new_tokens=8, group=2, **arrays, **numbers)
    for row in range(ROWS):
        assert_row(expected, outside, row)


def test_one_trace_serves_every_setting_and_batch():
    traced = []
    model, params, _ = toys.history()

    def logits(params, states):
        traced.append(1)
        return states

    sample = jax.jit(functools.partial(generate, model._replace(logits=logits), max_new_tokens=8, group=2))
    rng = np.random.default_rng(0)
    outcomes = set()
    for count in range(20):
        if count % 7 == 0:
            prompts, lengths = jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32), jnp.asarray(rng.integers(1, 6, 3))
        values = {name: [column[i] for i in rng.integers(0, ROWS, ROWS)] for name, column in VALUES.items()}
        samples = sample(params, prompts, lengths.astype(jnp.int32), jax.random.key(count), **spread(values))
        outcomes.add(tuple(samples.tokens.ravel().tolist()))
    assert len(traced) == 1 and len(outcomes) == 20


def test_numbers_of_python_compile_once_too(key):
    traced = []
    model, params, _ = toys.history()
    model = model._replace(logits=lambda params, states: (traced.append(1), states)[1])
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=2))
    for temperature, top_k, max_tokens in ((1.0, 0, 2), (0.0, 3, 1), (0.5, 10, 2)):
        sample(params, PROMPTS, LENGTHS, key, temperature=temperature, top_k=top_k, max_tokens=max_tokens)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"max_tokens=5; expected at most max_new_tokens=4", {"max_tokens": 5}),
        (r"max_tokens=\[1 9 1\]; expected at most max_new_tokens=4", {"max_tokens": jnp.array([1, 9, 1])}),
        (r"max_tokens=0; expected values in \[1, 2147483647\]", {"max_tokens": 0}),
        (r"stop has -1 behind an id", {"stop": np.array([[1, -1]])}),
        (r"eos_ids=\[-2\]; expected ids of at least -1", {"eos_ids": np.array([-2])}),
        (r"top_p=0\.0; expected values in \(0, 1\]", {"top_p": 0.0}),
    ],
)
def test_what_is_known_is_refused_inside_of_jit_too(message, settings, key):
    model, params, _ = toys.history()
    sample = functools.partial(generate, model, max_new_tokens=4, **settings)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(sample, params, PROMPTS, LENGTHS, key)


def test_traced_max_tokens_are_cut_at_the_room_there_is(key):
    samples = sample({"max_tokens": [100, 0, 8, 1, 2, 3]}, key)
    assert samples.lengths.tolist() == [8, 0, 8, 1, 2, 3]
    assert samples.mask.sum(axis=1).tolist() == [8, 0, 8, 1, 2, 3]
