"""The choice of a token: both log-probabilities against sorting in float64, and what the cheap way leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import toys
from references.processed import penalised, processed

from alignax.sampling import Settings, choose, draw

NONE = {"eos_ids": (), "forbidden": (), "stop": ()}
ROWS = 64
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.6},
    {"temperature": 1.5, "min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5, "temperature": 0.0},
    {"forbidden": (1, 4)},
    {"temperature": 0.8, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "forbidden": (0, 2)},
]


@functools.partial(jax.jit, static_argnames="process")
def chosen(logits, tokens, columns, key, settings, process=()):
    uniform = draw.uniforms(draw.row_keys(key, jnp.arange(len(logits))), columns)
    return choose.choose(logits, tokens, columns, uniform=uniform, settings=settings, process=process)


def settings_of(rows, **settings):
    return Settings.make(rows, max_new_tokens=8, **(NONE | settings))


def per_row(names=SETTINGS):
    """One `Settings` whose rows take those of the table in turn."""
    table = [names[row % len(names)] for row in range(ROWS)]
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    numbers = {name: jnp.asarray([one.get(name, off) for one in table]) for name, off in defaults.items()}
    forbidden = np.full((ROWS, 2), -1)
    for row, one in enumerate(table):
        forbidden[row, : len(one.get("forbidden", ()))] = one.get("forbidden", ())
    return table, settings_of(ROWS, **numbers, forbidden=jnp.asarray(forbidden))


def problem(size, seed=0):
    """Logits, rows that are filled to different columns, and these."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.3, 2, (ROWS, size)).astype(np.float32)
    columns = rng.integers(1, 9, ROWS)
    tokens = np.where(np.arange(9)[None] < columns[:, None], rng.integers(0, size, (ROWS, 9)), 0)
    return logits, tokens.astype(np.int32), columns.astype(np.int32)


@pytest.mark.parametrize("size", [8, 300, 33_000])  # part of a block, blocks, and blocks that are padded
def test_both_log_probabilities_are_those_of_the_formulas(size, key):
    logits, tokens, columns = problem(size)
    table, settings = per_row()
    found = chosen(logits, tokens, columns, key, settings)
    differ = 0
    for row, setting in enumerate(table):
        token = int(found.token[row])
        after = processed(logits[row], tokens[row, : columns[row]], **setting)
        own = toys.log_softmax(logits[row] / (setting.get("temperature", 1.0) or 1.0))
        assert np.isfinite(after[token]), (row, setting)
        assert abs(found.processed_logp[row] - after[token]) <= 1e-5
        assert abs(found.logp[row] - own[token]) <= 1e-5
        differ += abs(after[token] - own[token]) > 0.05
    assert differ > ROWS / 3


@pytest.mark.parametrize("setting", SETTINGS[3:], ids=str)
def test_frequencies_are_those_of_the_formulas(setting):
    """Forbidden and filtered tokens never occur, and the others keep their proportions."""
    logits, tokens, columns = problem(8, seed=1)
    count = 4000
    rows = [np.repeat(x[:1], count, axis=0) for x in (logits, tokens, columns)]
    found = chosen(*rows, jax.random.key(1), settings_of(count, **setting))
    p = np.exp(processed(logits[0], tokens[0, : columns[0]], **setting))
    observed = np.bincount(found.token, minlength=8)
    assert not np.any(observed[p == 0])
    assert np.all(np.abs(observed - count * p) <= 3.5 * np.sqrt(count * p * (1 - p)) + 1e-6)


def test_all_but_one_forbidden_and_all_of_them():
    logits, tokens, columns = problem(8)
    forbid = functools.partial(settings_of, ROWS)
    found = chosen(logits, tokens, columns, jax.random.key(0), forbid(forbidden=tuple(t for t in range(8) if t != 5)))
    assert np.all(found.token == 5) and np.all(found.processed_logp == 0)
    np.testing.assert_allclose(found.logp, toys.log_softmax(logits)[:, 5], atol=1e-5)
    # nothing can be right then: it shows
    found = chosen(logits, tokens, columns, jax.random.key(0), forbid(forbidden=tuple(range(8))))
    assert np.all(np.isnan(found.processed_logp))


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 300}, {"top_k": 10**6}, {"min_p": 1e-30}, {"forbidden": (-1,)}, {"forbidden": (300,)}],
    ids=str,
)
def test_filters_that_keep_everything_draw_the_same_tokens(setting, key):
    logits, tokens, columns = problem(300)
    setting = {name: np.array(value) if isinstance(value, tuple) else value for name, value in setting.items()}
    for temperature in (1.0, 0.7):
        plain = chosen(logits, tokens, columns, key, settings_of(ROWS, temperature=temperature))
        bent = chosen(logits, tokens, columns, key, settings_of(ROWS, temperature=temperature, **setting))
        np.testing.assert_array_equal(plain.token, bent.token)
        np.testing.assert_allclose(bent.logp, plain.logp, rtol=0, atol=1e-6)
        np.testing.assert_allclose(bent.processed_logp, plain.logp, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(plain.logp, plain.processed_logp)


def test_one_bent_row_changes_no_other(key):
    logits, tokens, columns = problem(300)
    plain = chosen(logits, tokens, columns, key, settings_of(ROWS))
    bent = chosen(logits, tokens, columns, key, settings_of(ROWS, top_k=jnp.arange(ROWS) // (ROWS - 1)))
    np.testing.assert_array_equal(plain.token[:-1], bent.token[:-1])
    np.testing.assert_allclose(bent.logp, toys.log_softmax(logits)[np.arange(ROWS), bent.token], atol=1e-5)
    assert bent.token[-1] == np.argmax(logits[-1]) and bent.processed_logp[-1] == 0


def test_greedy(key):
    logits, tokens, columns = problem(300)
    logits[0, [7, 9]] = 50  # the first of equals
    found = chosen(logits, tokens, columns, key, settings_of(ROWS, temperature=0.0, top_p=0.3, top_k=5))
    np.testing.assert_array_equal(found.token, np.argmax(logits, axis=1))
    np.testing.assert_allclose(found.logp, toys.log_softmax(logits).max(axis=1), atol=1e-5)
    np.testing.assert_array_equal(found.processed_logp, np.zeros(ROWS))


def test_processes_see_penalised_logits_in_order(key):
    logits, tokens, columns = problem(8)

    def stretch(logits, tokens, columns):
        return logits * (1 + tokens[:, :1] / 4)

    def low_ones_go(logits, tokens, columns):
        return jnp.where(logits < jnp.max(logits, axis=1, keepdims=True) - columns[:, None] / 2, -jnp.inf, logits)

    setting = {"repetition_penalty": 1.5, "forbidden": (3,), "temperature": 0.5, "top_k": 4}
    found = chosen(logits, tokens, columns, key, settings_of(ROWS, **setting), process=(stretch, low_ones_go))
    for row, column in enumerate(columns):
        z = penalised(logits[row], tokens[row, :column], 1.5, (3,)) * (1 + tokens[row, 0] / 4)
        z[z < z.max() - column / 2] = -np.inf
        expected = processed(z, (), temperature=0.5, top_k=4)
        assert abs(found.processed_logp[row] - expected[int(found.token[row])]) <= 1e-5
        own = toys.log_softmax(logits[row] / 0.5)
        assert abs(found.logp[row] - own[int(found.token[row])]) <= 1e-5


def subprograms(equation):
    found = (x for value in equation.params.values() for x in (value if isinstance(value, tuple | list) else [value]))
    return [getattr(x, "jaxpr", x) for x in found if hasattr(x, "eqns") or hasattr(x, "jaxpr")]


def primitives(jaxpr, *, into_branches):
    """The primitives of a program, with those inside of a condition or without."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        if into_branches or equation.primitive.name != "cond":
            for inner in subprograms(equation):
                yield from primitives(inner, into_branches=into_branches)


def test_rows_that_ask_for_nothing_pay_for_nothing():
    logits, tokens, columns = problem(300)
    program = jax.make_jaxpr(lambda *args: choose.choose(*args[:3], uniform=args[3], settings=args[4]))
    jaxpr = program(*map(jnp.asarray, (logits, tokens, columns)), jnp.zeros((ROWS, 2)), settings_of(ROWS)).jaxpr
    outside, everywhere = (list(primitives(jaxpr, into_branches=inside)) for inside in (False, True))
    assert not {"sort", "top_k", "approx_top_k"} & set(everywhere)
    assert outside.count("cond") == 1
    assert not {"while", "scan", "scatter", "cumsum", "exp"} & (set(outside) - {"cond"})
    (branch,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    plain, bent = (list(primitives(x.jaxpr, into_branches=True)) for x in branch.params["branches"])
    assert not {"while", "scan", "scatter", "cond"} & set(plain)
    assert plain.count("exp") == 2  # of all tokens, and of those of a block
    assert {"scatter", "cond"} < set(bent) and {"while", "scan"} & set(bent)


def test_logits_may_be_of_another_dtype(key):
    logits, tokens, columns = problem(8)
    _, settings = per_row()
    half = jnp.asarray(logits, jnp.bfloat16)
    found, expected = (chosen(x, tokens, columns, key, settings) for x in (half, half.astype(jnp.float32)))
    for leaf, other in zip(found, expected):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


def test_a_row_that_may_take_no_token_says_so(key):
    """Greedy rows too, whose log-probability is 0 where there is a choice."""
    settings = settings_of(2, temperature=jnp.array([0.0, 1.0]), forbidden=(0, 1, 2))
    found = chosen(jnp.zeros((2, 3)), jnp.zeros((2, 4), jnp.int32), jnp.ones(2, jnp.int32), key, settings)
    assert np.all(np.isnan(found.processed_logp)) and found.token.tolist() == [0, 0]
    np.testing.assert_allclose(found.logp, -np.log(3), rtol=1e-6)
