"""The parity report against numpy, and what it must give away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from references import toys

from alignax.sampling import Samples, compare_logp, generate, parity_report

LENGTHS = np.array([3, 1, 2], np.int32)
PROMPTS = np.array([[1, 2, 3], [4, 0, 0], [0, 3, 0]], np.int32)


@functools.cache
def sampler():
    return jax.jit(functools.partial(generate, toys.chain(), max_new_tokens=7, group=2, eos_ids=(2,)))


@functools.cache
def report():
    """Compiled once: neither temperature nor tolerance is part of the program."""
    return jax.jit(functools.partial(parity_report, toys.chain()))


def table(seed=0):
    return jax.random.normal(jax.random.key(seed), (5, 5))


def sampled(temperature=1.0, **settings):
    arrays = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS), jax.random.key(3)
    return sampler()(table(), *arrays, temperature=temperature, **settings)


def expected(params, samples, temperature, tolerance):
    """The report by its formulas, token by token."""
    differences = []
    tokens, mask, logp = map(np.asarray, (samples.tokens, samples.mask, samples.logp))
    heat = np.broadcast_to(np.where(np.asarray(temperature) == 0, 1.0, temperature), (len(tokens),))
    for row in range(len(tokens)):
        logps = toys.log_softmax(np.asarray(params) / heat[row])
        for t in np.flatnonzero(mask[row]):
            differences.append(logps[tokens[row, t - 1], tokens[row, t]] - float(logp[row, t]))
    d = np.array(differences)
    return np.abs(d).max(), np.abs(d).mean(), np.mean(np.exp(d) - 1 - d), np.mean(np.abs(d) > tolerance), len(d)


@pytest.mark.parametrize("seed, temperature", [(1, 1.0), (0, 0.7), (1, 1.3)])
def test_is_the_formula(seed, temperature):
    samples = sampled()
    found = report()(table(seed), samples, temperature=temperature, tolerance=0.5)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in found)
    np.testing.assert_allclose(found, expected(table(seed), samples, temperature, 0.5), rtol=1e-5)
    assert found.max > 0.5 and found.mean > 0.1 and found.k3 > 0.01 and 0 < found.outside < 1


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_agreement_is_rounding(temperature):
    """Also of greedy rows, which report their logp at 1; filters enter processed_logp alone."""
    samples = sampled(temperature, top_p=0.9, min_p=0.05)
    assert not np.array_equal(samples.processed_logp, samples.logp)
    found = report()(table(), samples, temperature=temperature, tolerance=1e-5)
    assert found.max < 1e-5 and found.k3 < 1e-10 and found.outside == 0 and found.tokens == samples.lengths.sum()


def test_every_row_may_have_a_temperature_of_its_own():
    temperature = jnp.array([1.0, 0.0, 0.5, 2.0, 1.0, 0.7])
    samples = sampled(temperature)
    assert report()(table(), samples, temperature=temperature, tolerance=1e-5).outside == 0
    found = report()(table(), samples, temperature=temperature[::-1], tolerance=1e-5)
    np.testing.assert_allclose(found, expected(table(), samples, temperature[::-1], 1e-5), rtol=1e-5)
    assert found.max > 0.1


def test_another_temperature_and_other_weights_show():
    samples = sampled(0.7)
    assert report()(table(), samples, temperature=0.7).outside == 0
    for other in (
        report()(table(), samples, temperature=1.0),
        report()(table() + 0.1 * table(1), samples, temperature=0.7),
    ):
        assert other.max > 0.01 and other.k3 > 1e-4 and other.outside > 0.5


def test_k3_estimates_the_kl_of_the_sampler_to_the_trainer():
    """Over many draws from one known distribution, within 4 standard errors; the KL of the other order is far off."""
    params, trainer = jnp.array([[0.0, 1.0, 2.0, 3.0, -4.0]] * 5), jnp.array([[0.0, 1.0, 2.0, -1.0, 4.0]] * 5)
    p, q = (toys.log_softmax(np.asarray(x)[0]) for x in (params, trainer))
    kl, reverse = np.sum(np.exp(p) * (p - q)), np.sum(np.exp(q) * (q - p))
    terms = np.exp(q - p) - 1 - (q - p)
    spread = np.sqrt(np.sum(np.exp(p) * terms**2) - kl**2)
    many = jax.jit(functools.partial(generate, toys.chain(), max_new_tokens=40, group=250))
    samples = many(params, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), jax.random.key(0))
    found = report()(trainer, samples)
    assert found.tokens == 10_000 and abs(found.k3 - kl) < 4 * spread / 100 < abs(reverse - kl)


def test_what_lies_off_the_mask_is_not_read_and_what_lies_on_it_is_seen():
    logp, rollout = jnp.array([[jnp.nan, -1.0, -2.0, 7.0]]), jnp.array([[jnp.inf, -1.5, -2.0, jnp.nan]])
    found = compare_logp(logp, rollout, jnp.array([[0, 1, 1, 0]]), tolerance=0.5)
    d = np.array([0.5, 0.0])
    np.testing.assert_allclose(found, [0.5, 0.25, np.mean(np.exp(d) - 1 - d), 0.0, 2.0], rtol=1e-6)
    assert compare_logp(logp, rollout, jnp.array([[0, 1, 1, 0]]), tolerance=0.49).outside == 0.5
    np.testing.assert_array_equal(compare_logp(logp, rollout, jnp.zeros((1, 4))), np.zeros(5))
    loud = compare_logp(logp, rollout, jnp.array([[0, 1, 1, 1]]))
    assert np.isnan([loud.max, loud.mean, loud.k3]).all() and loud.outside == pytest.approx(2 / 3)
    far = compare_logp(jnp.array([[-1e9, 0.0]]), jnp.array([[-1.0, -1e9]]), jnp.ones((1, 2)))
    assert np.isfinite(far.k3) and far.outside == 1


def test_refusals():
    samples = Samples(*(jnp.ones((2, 3)).astype(t) for t in ("int32", "int32", bool, "float32")), *[jnp.ones(2)] * 2)
    with pytest.raises(ValueError, match=r"parity_report: temperature of shape \(3,\); expected a number or \(2,\)"):
        parity_report(toys.chain(), table(), samples, temperature=jnp.ones(3))
    with pytest.raises(ValueError, match=r"parity_report: temperature=-1\.0; expected 0 or more"):
        parity_report(toys.chain(), table(), samples, temperature=-1.0)
