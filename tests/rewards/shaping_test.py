import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses, rewards


def loop(scores, logp, ref_logp, mask, kl_coef):
    out = np.zeros(mask.shape)
    for b in range(len(mask)):
        chosen = np.flatnonzero(mask[b])
        for t in chosen:
            out[b, t] = -kl_coef * (logp[b, t] - ref_logp[b, t]) + (scores[b] if t == chosen[-1] else 0)
    return out


def test_shaped_rewards_equal_the_loop():
    rng = np.random.default_rng(0)
    logp, ref_logp = rng.normal(size=(2, 6, 9)).astype(np.float32)
    scores, mask = rng.normal(size=6).astype(np.float32), rng.random((6, 9)) < 0.5
    mask[1], scores[1], mask[2] = False, np.nan, True  # an empty row's score does not matter; a row to the last column
    dirty = [jnp.where(mask, x, jnp.nan) for x in (logp, ref_logp)]
    shaped = jax.jit(rewards.shaped_rewards)
    for kl_coef in (0.3, 0.0):
        ours = shaped(jnp.asarray(scores), *dirty, jnp.asarray(mask), kl_coef=kl_coef)
        np.testing.assert_allclose(ours, loop(scores, logp, ref_logp, mask, kl_coef), rtol=1e-5, atol=1e-6)


def test_other_places_of_the_score():
    """TRL's PPO: behind the last token, where it fits. lm-human-preferences: in the last column of equal lengths."""
    logp, scores, mask = jnp.array([[-1.0, -2.0, 9.0], [-1.0, -2.0, -3.0]]), jnp.array([3.0, 4.0]), jnp.array([2, 3])
    ref_logp = jnp.array([[-1.5, -2.0, 9.0], [-1.5, -2.0, -3.0]])
    columns = jnp.arange(3)[None]
    behind = rewards.shaped_rewards(scores, logp, ref_logp, columns <= mask[:, None], kl_coef=0.2)
    np.testing.assert_allclose(behind, [[-0.1, 0.0, 3.0], [-0.1, 0.0, 4.0]], atol=1e-6)
    last = rewards.shaped_rewards(scores, logp, ref_logp, jnp.ones((2, 3)), kl_coef=0.2)
    np.testing.assert_allclose(last[:, -1], scores)


@pytest.mark.parametrize("kl", [losses.k2, losses.k3, losses.absolute])
def test_any_estimator_will_do(kl):
    logp, ref_logp, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -1.0]]), jnp.array([[1, 1]])
    shaped = rewards.shaped_rewards(jnp.array([3.0]), logp, ref_logp, mask, kl_coef=0.5, kl=kl)
    of_difference = {losses.k2: lambda d: d**2 / 2, losses.k3: lambda d: np.exp(-d) - 1 + d, losses.absolute: np.abs}
    expected = -0.5 * of_difference[kl](np.array([[0.5, -1.0]])) + np.array([[0.0, 3.0]])
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)


def test_rows_that_did_not_end():
    scores, finished = jnp.array([2.0, 3.0, jnp.nan]), jnp.array([True, False, False])
    np.testing.assert_array_equal(rewards.subtract_missing_eos(scores, finished, penalty=0.5), [2, 2.5, np.nan])
    np.testing.assert_array_equal(rewards.replace_missing_eos(scores, finished, score=-4.0), [2, -4, -4])
    np.testing.assert_array_equal(rewards.scale_missing_eos(scores, finished, factor=0.5), [2, 1.5, np.nan])


@pytest.mark.parametrize("factor", [-0.1, 1.5, jnp.float32(2.0)])
def test_a_factor_out_of_range_is_refused(factor):
    with pytest.raises(ValueError, match=r"factor=.*expected 0 <= factor <= 1"):
        rewards.scale_missing_eos(jnp.ones(2), jnp.ones(2), factor=factor)


def test_llama2_scores():
    # unsafe, safe, and a prompt on which safety counts whatever it is; certainty stays finite
    safety, helpfulness = jnp.array([0.1, 0.9, 0.5, 1.0]), jnp.array([0.9, 0.3, 0.9, 1.0])
    chosen = np.array([0.1, 0.3, 0.5, 1 - 1e-6])
    logit = np.log(chosen / (1 - chosen))
    expected = (logit - logit.mean()) / logit.std(ddof=1)
    combine = jax.jit(rewards.llama2_scores)
    ours = combine(safety, helpfulness, jnp.array([0, 0, 1, 0]))
    np.testing.assert_allclose(ours, expected, rtol=5e-3)  # 1 - 1e-6 has few digits in float32
    equal = jnp.full(4, 0.7)
    np.testing.assert_array_equal(combine(equal, equal, jnp.zeros(4, int)), np.zeros(4))


def test_llama2_vector(shared):
    found = json.loads((shared / "spec" / "vectors_preference.json").read_text())
    (vector,) = [vector for vector in found if vector["id"] == "llama2_gated_whitened"]
    x = vector["inputs"]
    arrays = (jnp.array(x[name]) for name in ("safety_prob", "helpful_prob", "is_safety_prompt"))
    ours = rewards.llama2_scores(*arrays, **vector["hyperparameters"])
    np.testing.assert_allclose(ours, vector["expected"]["whitened"], rtol=1e-5)


def test_rewards_are_constants():
    x, mask = jnp.ones((2, 3)), jnp.ones((2, 3))

    def everything(x):
        scores = x[:, 0]
        return (
            jnp.sum(rewards.shaped_rewards(scores, x, 2 * x, mask, kl_coef=0.1))
            + jnp.sum(rewards.subtract_missing_eos(scores, mask[:, 0]))
            + jnp.sum(rewards.llama2_scores(scores / 3, scores / 2, mask[:, 0]) ** 2)
        )

    np.testing.assert_array_equal(jax.jit(jax.grad(everything))(x), np.zeros((2, 3)))


def test_bad_shapes_are_refused():
    x = jnp.ones((2, 3))
    with pytest.raises(Exception, match=r"shape|type"):
        rewards.shaped_rewards(jnp.ones(3), x, x, x, kl_coef=0.1)
    with pytest.raises(Exception, match=r"shape|type"):
        rewards.subtract_missing_eos(jnp.ones(3), jnp.ones(2))


def test_soft_overlong_is_a_line_between_two_constants():
    lengths = jnp.array([0, 60, 80, 85, 100, 500])
    found = jax.jit(rewards.soft_overlong)(lengths, max_length=100, cache=20, factor=2.0)
    np.testing.assert_allclose(found, [0.0, 0.0, 0.0, -0.5, -2.0, -2.0], atol=1e-6)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(rewards.soft_overlong(lengths, max_length=100, cache=100)[1], -0.6, rtol=1e-6)


@pytest.mark.parametrize("cache", [0, -1, 101])
def test_soft_overlong_refuses(cache):
    with pytest.raises(ValueError, match=rf"cache={cache}, max_length=100; expected 0 < cache <= max_length"):
        rewards.soft_overlong(jnp.ones(2), max_length=100, cache=cache)
