"""TRPO: its parts against numpy, its steps against the bound they are given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import problems, tiny

from alignax import losses, reduce, trpo
from alignax.logprobs import token_logprobs

B, T, V, D = 3, 5, 4, 3


def policy(states, params):
    """Logits [B, T, V]; the last leaf of the parameters enters nowhere."""
    return states @ jnp.exp(params["w"]) + params["more"][0][None, None]


def small(seed=0):
    """States, parameters, and actions, advantages and mask."""
    rng = np.random.default_rng(seed)
    states = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    params = {"w": rng.normal(size=(D, V)), "more": (rng.normal(size=V), rng.normal(size=2))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    mask = jnp.asarray(rng.random((B, T)) < 0.7)
    rows = (jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(rng.normal(size=(B, T)), jnp.float32), mask)
    return states, params, rows


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def explicit_fisher(states, params, mask):
    """The mean over tokens of J' (diag p - p p') J, in float64."""
    logits, jacobian = jax.jit(lambda p: (policy(states, p), jax.jacrev(functools.partial(policy, states))(p)))(params)
    j = np.concatenate([np.reshape(x, (B, T, V, -1)) for x in jax.tree.leaves(jacobian)], axis=3).astype(np.float64)
    p = np.asarray(jax.nn.softmax(logits), np.float64)
    chosen = [j[i].T @ (np.diag(p[i]) - np.outer(p[i], p[i])) @ j[i] for i in np.ndindex(B, T) if mask[i]]
    return np.mean(chosen, axis=0)


def test_fisher_vector_product_is_that_of_the_explicit_matrix_and_of_the_hessian_of_the_divergence():
    states, params, (_, _, mask) = small()
    vector = jax.tree.map(lambda x: jnp.cos(7 * x), params)

    def dirty(params):
        return jnp.where(mask[..., None], policy(states, params), jnp.nan)

    def kl(moved):
        return reduce.token_mean(losses.full_kl(policy(states, params), policy(states, moved), mask), mask).value()

    @jax.jit
    def both(vector):
        ours = trpo.fisher_vector_product(dirty, params, mask, vector, damping=0.2)
        return ours, jax.jvp(jax.grad(kl), (params,), (vector,))[1]

    ours, hessian = map(flat, both(vector))
    expected = explicit_fisher(states, params, np.asarray(mask)) @ flat(vector)
    np.testing.assert_allclose(ours, expected + 0.2 * flat(vector), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hessian, expected, rtol=1e-4, atol=1e-5)


def test_conjugate_gradient_solves():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    matrix = (root @ root.T + np.eye(6)).astype(np.float32)
    b = {"a": jnp.asarray(rng.normal(size=(2, 2)), jnp.float32), "b": jnp.asarray(rng.normal(size=2), jnp.float32)}

    def product(v):
        image = jnp.asarray(matrix) @ jnp.concatenate([v["a"].ravel(), v["b"]])
        return {"a": image[:4].reshape(2, 2), "b": image[4:]}

    solve = jax.jit(functools.partial(trpo.conjugate_gradient, product))
    expected = np.linalg.solve(matrix.astype(np.float64), flat(b))
    np.testing.assert_allclose(flat(solve(b, iterations=20)), expected, rtol=1e-3, atol=1e-4)
    # the first iteration is the best step along b
    along = flat(b) * (flat(b) @ flat(b)) / (flat(b) @ matrix @ flat(b))
    np.testing.assert_allclose(flat(solve(b, iterations=1)), along, rtol=1e-5)
    np.testing.assert_array_equal(flat(solve(b, tolerance=1e9)), np.zeros(6))
    zero = jax.tree.map(jnp.zeros_like, b)
    np.testing.assert_array_equal(flat(solve(zero, tolerance=0.0)), np.zeros(6))


@functools.cache
def compiled(accept):
    """One program for all seeds and numbers, and its traces."""
    traces = []

    @jax.jit
    def step(states, params, rows, hyper):
        traces.append(1)
        new, info = trpo.trpo_step(functools.partial(policy, states), params, *rows, accept=accept, **hyper)
        old_logits, logits, mask = policy(states, params), policy(states, new), rows[2]
        kl = reduce.token_mean(losses.full_kl(old_logits, logits, mask), mask).value()
        gain = trpo.surrogate(logits, *rows, old_logits=old_logits) - trpo.surrogate(old_logits, *rows)
        return new, info, kl, gain

    return step, traces


HYPER = {"max_kl": 0.01, "damping": 0.1, "iterations": 8, "backtracks": 12}


@pytest.mark.parametrize("accept", [trpo.accept_improvement, trpo.accept_expected])
def test_steps_stay_inside_the_bound_and_improve(accept):
    step, traces = compiled(accept)
    backtracks = []
    for seed, max_kl in enumerate((0.001, 0.01, 0.1, 1.0, 5.0, 30.0, 100.0)):
        states, params, rows = small(seed)
        hyper = {"max_kl": max_kl, "damping": 0.01 * (seed + 1), "iterations": 8 + seed, "backtracks": 12}
        new, info, kl, gain = step(states, params, rows, hyper)
        np.testing.assert_allclose([info["kl"], info["improvement"]], [kl, gain], rtol=1e-3, atol=1e-6)
        assert info["accepted"] and 0 < kl <= max_kl * (1.5 if accept is trpo.accept_improvement else 1.0)
        assert gain >= (
            0 if accept is trpo.accept_improvement else 0.1 * 0.5 ** info["backtracks"] * info["expected_improvement"]
        )
        np.testing.assert_array_equal(new["more"][1], params["more"][1])  # nothing depends on it
        backtracks.append(int(info["backtracks"]))
    assert min(backtracks) == 0 < max(backtracks)
    assert len(traces) == 1


def test_a_line_search_that_finds_only_nan_keeps_the_parameters():
    states, params, (actions, advantages, _) = small()
    states = states.at[0, 0, 0].set(jnp.nan)  # all logits of one token
    new, info, _, _ = compiled(trpo.accept_improvement)[0](
        states, params, (actions, advantages, jnp.ones((B, T), bool)), HYPER
    )
    jax.tree.map(np.testing.assert_array_equal, new, params)
    assert not info["accepted"] and info["backtracks"] == 12 and info["kl"] == 0


def test_without_advantages_or_tokens_nothing_moves():
    states, params, (actions, advantages, mask) = small()
    for rows in ((actions, 0 * advantages, mask), (actions, advantages, jnp.zeros_like(mask))):
        new, info, _, _ = compiled(trpo.accept_improvement)[0](states, params, rows, HYPER)
        jax.tree.map(np.testing.assert_array_equal, new, params)
        assert info["step_scale"] == 0 and info["improvement"] == 0 and not np.isnan(flat(info)).any()


def test_what_is_masked_out_does_not_matter():
    states, params, (actions, advantages, mask) = small()
    step, _ = compiled(trpo.accept_improvement)
    new, *_ = step(states, params, (actions, advantages, mask), HYPER)
    dirty = (jnp.where(mask, actions, 0), jnp.where(mask, advantages, jnp.nan), mask)
    jax.tree.map(np.testing.assert_array_equal, step(states, params, dirty, HYPER)[0], new)


def test_acceptance_rules():
    number = jnp.float32
    assert trpo.accept_improvement(number(0.014), number(0.0), number(9.0), 0.01)
    assert not trpo.accept_improvement(number(0.016), number(1.0), number(1.0), 0.01)
    assert not trpo.accept_improvement(number(0.01), number(-1e-6), number(1.0), 0.01)
    assert trpo.accept_expected(number(0.01), number(0.11), number(1.0), 0.01)
    assert not trpo.accept_expected(number(0.011), number(0.11), number(1.0), 0.01)
    assert not trpo.accept_expected(number(0.01), number(0.09), number(1.0), 0.01)
    for rule in (trpo.accept_improvement, trpo.accept_expected):
        assert not rule(number(jnp.nan), number(1.0), number(1.0), 0.01)
        assert not rule(number(0.0), number(jnp.nan), number(1.0), 0.01)


def test_a_bandit_improves_with_every_step():
    reward = jnp.array([0.0, 0.5, 1.0, -1.0])

    def logits(theta):
        return jnp.broadcast_to(theta, (1, 400, 4))

    @jax.jit
    def step(theta, key):
        actions = jax.random.categorical(key, theta, shape=(1, 400))
        rewards = reward[actions]
        return trpo.trpo_step(logits, theta, actions, rewards - jnp.mean(rewards), jnp.ones((1, 400)), max_kl=0.02)

    theta, curve = jnp.zeros((4,)), []
    for key in jax.random.split(jax.random.key(0), 15):
        curve.append(float(jax.nn.softmax(theta) @ reward))
        theta, _ = step(theta, key)
    assert np.all(np.diff(curve) > 0) and curve[0] == 0.125 and curve[-1] > 0.7


def test_a_step_of_a_language_model():
    """Rows of weight 0 do not matter, and what is reported holds for log-probabilities by the library's own path."""
    model, params = tiny()
    batch = jax.tree.map(lambda x: jnp.asarray(x[:4]), problems()["grpo"].batch)
    weights = jnp.array([1.0, 1.0, 1.0, 0.0])
    batch = batch._replace(weights=weights, old_logp=None, ref_logp=None)
    step = jax.jit(trpo.make_trpo(model, temperature=0.8))
    new, info = step(params, batch, {"max_kl": 0.02})
    assert info["accepted"] and 0 < info["kl"] <= 0.03 and info["improvement"] > 0
    other = batch._replace(tokens=batch.tokens.at[3].set(7), advantages=batch.advantages.at[3].set(jnp.nan))
    again, _ = step(params, other, {"max_kl": 0.02})
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), again, new)

    @jax.jit
    def logp(params):
        return token_logprobs(model, params, batch.tokens, batch.segments, mask=batch.mask, temperature=0.8)

    ratio = np.exp(np.asarray(logp(new)) - np.asarray(logp(params)))
    chosen = np.asarray(batch.mask) & (np.asarray(weights)[:, None] > 0)
    gain = ((ratio - 1) * np.asarray(batch.advantages)[:, None])[chosen].mean()
    np.testing.assert_allclose(info["improvement"], gain, rtol=1e-3)
