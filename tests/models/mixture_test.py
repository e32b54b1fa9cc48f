"""The geometric mixture against the normalised product of two known distributions, sampled and scored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows, tiny
from references import toys

from alignax import logprobs, models, sampling

POLICY, REFERENCE = (np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32) for seed in (0, 1))


def chain_of(weight):
    """Its parameters, and the log-probabilities [5, 5] of the next token given the last, from the definition."""
    p, q = toys.log_softmax(POLICY), toys.log_softmax(REFERENCE)
    product = np.exp(p) ** (1 - weight) * np.exp(q) ** weight
    params = {"policy": jnp.asarray(POLICY), "reference": jnp.asarray(REFERENCE), "weight": jnp.asarray(weight)}
    return params, np.log(product / product.sum(axis=1, keepdims=True))


@functools.cache
def sampler(model, group, new_tokens):
    return jax.jit(functools.partial(sampling.generate, model, group=group, max_new_tokens=new_tokens))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_samples_follow_the_product_token_by_token(weight):
    params, expected = chain_of(weight)
    sample = sampler(models.mixture(toys.chain()), 2000, 3)
    found = sample(params, jnp.array([[2, 0], [4, 1]]), jnp.array([1, 2]), jax.random.key(3))
    tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
    counts, total = np.zeros((5, 5)), 0.0
    for t in range(1, tokens.shape[1]):
        here = mask[:, t]
        np.testing.assert_allclose(
            found.logp[here, t], expected[tokens[here, t - 1], tokens[here, t]], rtol=0, atol=1e-5
        )
        np.add.at(counts, (tokens[here, t - 1], tokens[here, t]), 1)
    for before, row in enumerate(counts):  # chi-square, 4 degrees of freedom: 1e-5 lie above 28.5
        wanted = row.sum() * np.exp(expected[before])
        total = max(total, np.sum((row - wanted) ** 2 / np.maximum(wanted, 1e-9)))
    assert counts.sum() == 12000 and total < 28.5


def test_at_the_ends_it_is_the_policy_or_the_reference():
    for weight, table in ((0.0, POLICY), (1.0, REFERENCE)):
        params, _ = chain_of(weight)
        prompts = jnp.array([[2, 0], [4, 1]]), jnp.array([1, 2]), jax.random.key(0)
        mixed = sampler(models.mixture(toys.chain()), 4, 6)(params, *prompts)
        alone = sampler(toys.chain(), 4, 6)(jnp.asarray(table), *prompts)
        np.testing.assert_array_equal(mixed.tokens, alone.tokens)
        np.testing.assert_allclose(mixed.logp, alone.logp, atol=1e-6)


@pytest.fixture(scope="module")
def llama():
    model, params = tiny()
    return model, params, jax.tree.map(lambda x: 0.7 * x, params)


def test_a_transformer_s_cached_steps_are_its_forward_pass(llama):
    model, policy, reference = llama
    mixed = models.mixture(model)
    params = {"policy": policy, "reference": reference, "weight": jnp.asarray(0.25)}
    prompts = jnp.array([[3, 1, 4, 0], [2, 6, 9, 5]]), jnp.array([3, 4])
    found = sampler(mixed, 2, 6)(params, *prompts, jax.random.key(0), temperature=0.8)
    rows_of = (found.tokens, found.segments)
    uncached = logprobs.token_logprobs(mixed, params, *rows_of, mask=found.mask, temperature=0.8)
    np.testing.assert_allclose(found.logp, uncached, rtol=0, atol=1e-5)

    segments, log = found.segments, lambda p: model.logits(p, model.hidden(p, found.tokens, found.segments).states)
    logits = 0.75 * np.asarray(log(policy), np.float64) + 0.25 * np.asarray(log(reference), np.float64)
    by_hand = np.take_along_axis(toys.log_softmax(logits[:, :-1] / 0.8), np.asarray(found.tokens)[:, 1:, None], 2)
    expected = np.where(found.mask[:, 1:], by_hand[..., 0], 0.0)
    np.testing.assert_allclose(found.logp[:, 1:], expected, rtol=0, atol=1e-5)
    assert segments.sum() == found.mask.sum() + 14


def test_another_weight_compiles_nothing(llama):
    model, policy, reference = llama
    mixed, traces, batch = models.mixture(model), [], rows(2)

    @jax.jit
    def score(params):
        traces.append(1)
        return logprobs.token_logprobs(mixed, params, jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"]))

    a, b = (score({"policy": policy, "reference": reference, "weight": jnp.asarray(w)}) for w in (0.1, 0.9))
    assert len(traces) == 1 and not np.allclose(a, b)


def test_what_it_is_as_a_model(llama):
    model, params, _ = llama
    mixed = models.mixture(model)
    assert mixed.values is None and mixed.config is model.config
    made = models.mixture(toys.chain()).init(jax.random.key(0))
    assert set(made) == {"policy", "reference", "weight"}
    jax.tree.map(np.testing.assert_array_equal, made["policy"], made["reference"])
    with pytest.raises(ValueError, match=r"a mixture got parameters \['embed', .*'reference', 'weight'"):
        mixed.hidden(params, jnp.ones((1, 2), int), jnp.ones((1, 2), int))
    with pytest.raises(ValueError, match="a mixture got parameters list"):
        mixed.logits([params], jnp.ones((1, 2)))


def test_excluded_tokens():
    policy, reference = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([-jnp.inf, 0.0, 2.0])
    mix = models.geometric_mixture_logits
    np.testing.assert_array_equal(mix(policy, reference, mix=0.0), policy)
    np.testing.assert_array_equal(mix(policy, reference, mix=1.0), reference)
    np.testing.assert_array_equal(mix(policy, reference, mix=0.5), [-np.inf, -np.inf, 1.5])
    assert mix(policy.astype(jnp.bfloat16), reference.astype(jnp.bfloat16), mix=0.5).dtype == jnp.float32


@pytest.mark.parametrize("mix", [-0.1, 1.5, float("nan"), jnp.float32(2)])
def test_a_weight_out_of_range_is_refused(mix):
    with pytest.raises(ValueError, match=r"geometric_mixture_logits: mix=.*; expected 0 to 1"):
        models.geometric_mixture_logits(jnp.zeros(3), jnp.zeros(3), mix=mix)


def test_other_vocabularies_are_refused():
    with pytest.raises(Exception, match=r"logits of shape \(3,\) and \(4,\); expected the same|Type-check"):
        models.geometric_mixture_logits(jnp.zeros(3), jnp.zeros(4), mix=0.5)


def other():
    """A model with another width, depth and head, and its parameters."""
    config = models.TransformerConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4
    )
    model = models.transformer(dataclasses.replace(config, tie_embeddings=True, initializer_range=0.5))
    return model, model.init(jax.random.key(7))


def of_words():
    """A function of tokens, whose states are its logits."""
    model = models.from_apply(lambda table, tokens, segments: table[tokens], init=lambda key: jnp.zeros((32, 32)))
    return model, jax.random.normal(jax.random.key(8), (32, 32))


@pytest.mark.parametrize(("build", "swapped"), [(other, False), (of_words, True)])
def test_policy_and_reference_may_be_different_models(llama, build, swapped):
    members = [llama[:2], build()]
    (model, policy), (second, reference) = members[::-1] if swapped else members
    mixed = models.mixture(model, second)
    params = {"policy": policy, "reference": reference, "weight": jnp.asarray(0.3)}
    assert bool(mixed.fork) == (build is other) and mixed.unroll
    prompts = jnp.array([[3, 1, 4, 0], [2, 6, 9, 5]]), jnp.array([3, 4])
    found = sampler(mixed, 2, 5)(params, *prompts, jax.random.key(0))
    rows_of = (found.tokens, found.segments)
    both = [np.asarray(m.logits(p, m.hidden(p, *rows_of).states)) for m, p in ((model, policy), (second, reference))]
    logits = 0.7 * both[0].astype(np.float64) + 0.3 * both[1]
    by_hand = np.take_along_axis(toys.log_softmax(logits[:, :-1]), np.asarray(found.tokens)[:, 1:, None], 2)
    expected = np.where(found.mask[:, 1:], by_hand[..., 0], 0.0)
    np.testing.assert_allclose(found.logp[:, 1:], expected, rtol=0, atol=1e-5)
    made = jax.eval_shape(mixed.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_models_of_other_vocabularies_are_refused(llama):
    mixed = models.mixture(llama[0], toys.chain())
    params = {"policy": llama[1], "reference": jnp.zeros((5, 5)), "weight": jnp.asarray(0.3)}
    with pytest.raises(
        ValueError, match=r"a mixture of vocabularies of 32 \(policy\) and 5 \(reference\); expected one"
    ):
        mixed.logits(params, jnp.zeros((2, 21)))
