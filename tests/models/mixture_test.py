"""The geometric mixture against the normalised product of two known distributions, sampled and scored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from problems import rows, small, tiny
from references import toys

from alignax import logprobs, models, sampling

POLICY, REFERENCE = (np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32) for seed in (0, 1))


def chain_of(weight):
    """Its parameters, and the log-probabilities [5, 5] of the next token given the last, from the definition."""
    p, q = toys.log_softmax(POLICY), toys.log_softmax(REFERENCE)
    product = np.exp(p) ** (1 - weight) * np.exp(q) ** weight
    params = {"policy": POLICY, "reference": REFERENCE, "weight": np.float32(weight)}
    return params, np.log(product / product.sum(axis=1, keepdims=True))


@functools.cache
def sampler(model, group, new_tokens):
    return jax.jit(functools.partial(sampling.generate, model, group=group, max_new_tokens=new_tokens))


@functools.cache
def mixed_chain():
    """One model, so that one program samples from it whatever the weight."""
    return models.mixture(toys.chain())


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_samples_follow_the_product_token_by_token(weight):
    params, expected = chain_of(weight)
    sample = sampler(mixed_chain(), 2000, 3)
    found = sample(params, np.array([[2, 0], [4, 1]]), np.array([1, 2]), jax.random.key(3))
    tokens, mask, found_logp = np.asarray(found.tokens), np.asarray(found.mask), np.asarray(found.logp)
    counts, total = np.zeros((5, 5)), 0.0
    for t in range(1, tokens.shape[1]):
        here = mask[:, t]
        logp = expected[tokens[here, t - 1], tokens[here, t]]
        np.testing.assert_allclose(found_logp[here, t], logp, rtol=0, atol=1e-5)
        np.add.at(counts, (tokens[here, t - 1], tokens[here, t]), 1)
    for before, row in enumerate(counts):  # chi-square, 4 degrees of freedom: 1e-5 lie above 28.5
        wanted = row.sum() * np.exp(expected[before])
        total = max(total, np.sum((row - wanted) ** 2 / np.maximum(wanted, 1e-9)))
    assert counts.sum() == 12000 and total < 28.5


def test_at_the_ends_it_is_the_policy_or_the_reference():
    for weight, table in ((0.0, POLICY), (1.0, REFERENCE)):
        params, _ = chain_of(weight)
        prompts = np.array([[2, 0], [4, 1]]), np.array([1, 2]), jax.random.key(0)
        mixed = sampler(mixed_chain(), 2000, 3)(params, *prompts)
        alone = sampler(toys.chain(), 2000, 3)(table, *prompts)
        np.testing.assert_array_equal(mixed.tokens, alone.tokens)
        np.testing.assert_allclose(mixed.logp, alone.logp, atol=1e-6)


@pytest.fixture(scope="module")
def llama():
    model, params = tiny()
    return model, params, jax.tree.map(lambda x: np.float32(0.7) * np.asarray(x), params)


def test_a_transformer_s_cached_steps_are_its_forward_pass(llama):
    model, policy, reference = llama
    mixed = models.mixture(model)
    params = {"policy": policy, "reference": reference, "weight": np.float32(0.25)}
    prompts = np.array([[3, 1, 4, 0], [2, 6, 9, 5]]), np.array([3, 4])
    found = sampler(mixed, 2, 6)(params, *prompts, jax.random.key(0), temperature=0.8)
    rows_of = (found.tokens, found.segments)

    @jax.jit
    def uncached(params, tokens, segments, mask):
        row = (tokens, segments)
        logp = logprobs.token_logprobs(mixed, params, *row, mask=mask, temperature=0.8)
        return logp, [model.logits(p, model.hidden(p, *row).states) for p in (params["policy"], params["reference"])]

    logp, both = uncached(params, *rows_of, found.mask)
    np.testing.assert_allclose(found.logp, logp, rtol=0, atol=1e-5)
    logits = 0.75 * np.asarray(both[0], np.float64) + 0.25 * np.asarray(both[1], np.float64)
    by_hand = np.take_along_axis(toys.log_softmax(logits[:, :-1] / 0.8), np.asarray(found.tokens)[:, 1:, None], 2)
    expected = np.where(np.asarray(found.mask)[:, 1:], by_hand[..., 0], 0.0)
    np.testing.assert_allclose(np.asarray(found.logp)[:, 1:], expected, rtol=0, atol=1e-5)
    assert np.sum(found.segments) == np.sum(found.mask) + 14


def test_another_weight_compiles_nothing():
    model, policy = small()
    reference = jax.tree.map(lambda x: 0.7 * np.asarray(x), policy)
    mixed, traces, batch = models.mixture(model), [], rows(2)

    @jax.jit
    def score(params, tokens, segments):
        traces.append(1)
        return logprobs.token_logprobs(mixed, params, tokens, segments)

    parts, row = {"policy": policy, "reference": reference}, (batch["tokens"], batch["segments"])
    a, b = (score(parts | {"weight": np.float32(w)}, *row) for w in (0.1, 0.9))
    assert len(traces) == 1 and not np.allclose(a, b)


def test_what_it_is_as_a_model(llama):
    model, params, _ = llama
    mixed = models.mixture(model)
    assert mixed.values is None and mixed.config is model.config
    made = models.mixture(toys.chain()).init(jax.random.key(0))
    assert set(made) == {"policy", "reference", "weight"}
    jax.tree.map(np.testing.assert_array_equal, made["policy"], made["reference"])
    with pytest.raises(ValueError, match=r"a mixture got parameters \['embed', .*'reference', 'weight'"):
        mixed.hidden(params, *(jnp.asarray([[1, 1]]),) * 2)
    with pytest.raises(ValueError, match="a mixture got parameters list"):
        mixed.logits([params], jnp.asarray([[1.0, 1.0]]))


def test_excluded_tokens():
    policy, reference = np.float32([0.0, -np.inf, 1.0]), np.float32([-np.inf, 0.0, 2.0])
    mix = jax.jit(models.geometric_mixture_logits)
    np.testing.assert_array_equal(mix(policy, reference, mix=0.0), policy)
    np.testing.assert_array_equal(mix(policy, reference, mix=1.0), reference)
    np.testing.assert_array_equal(mix(policy, reference, mix=0.5), [-np.inf, -np.inf, 1.5])
    half = jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    assert jax.eval_shape(mix, half, half, mix=0.5).dtype == jnp.float32


@pytest.mark.parametrize("mix", [-0.1, 1.5, float("nan"), jnp.float32(2)])
def test_a_weight_out_of_range_is_refused(mix):
    with pytest.raises(ValueError, match=r"geometric_mixture_logits: mix=.*; expected 0 to 1"):
        models.geometric_mixture_logits(jnp.asarray(POLICY), jnp.asarray(REFERENCE), mix=mix)


def test_other_vocabularies_are_refused():
    with pytest.raises(Exception, match=r"logits of shape \(3,\) and \(4,\); expected the same|Type-check"):
        models.geometric_mixture_logits(jnp.asarray(POLICY[0, :3]), jnp.asarray(POLICY[0, :4]), mix=0.5)


def other():
    """A model with another width, depth and head, and its parameters."""
    config = models.TransformerConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4
    )
    model = models.transformer(dataclasses.replace(config, tie_embeddings=True, initializer_range=0.5))
    return model, drawn(model, 0.5)


def of_words():
    """A function of tokens, whose states are its logits."""
    model = models.from_apply(lambda table, tokens, segments: table[tokens], init=lambda key: jnp.zeros((32, 32)))
    return model, jnp.asarray(np.random.default_rng(8).normal(size=(32, 32)), jnp.float32)


@pytest.mark.parametrize(("build", "swapped"), [(other, False), (of_words, True)])
def test_policy_and_reference_may_be_different_models(llama, build, swapped):
    members = [llama[:2], build()]
    (model, policy), (second, reference) = members[::-1] if swapped else members
    mixed = models.mixture(model, second)
    params = {"policy": policy, "reference": reference, "weight": np.float32(0.3)}
    assert bool(mixed.fork) == (build is other) and mixed.unroll
    prompts = np.array([[3, 1, 4, 0], [2, 6, 9, 5]]), np.array([3, 4])
    found = sampler(mixed, 2, 5)(params, *prompts, jax.random.key(0))
    rows_of = (found.tokens, found.segments)
    each = (model, "policy"), (second, "reference")
    forward = jax.jit(lambda p, *row: [m.logits(p[name], m.hidden(p[name], *row).states) for m, name in each])
    both = [np.asarray(x, np.float64) for x in forward(params, *rows_of)]
    logits = 0.7 * both[0] + 0.3 * both[1]
    by_hand = np.take_along_axis(toys.log_softmax(logits[:, :-1]), np.asarray(found.tokens)[:, 1:, None], 2)
    expected = np.where(np.asarray(found.mask)[:, 1:], by_hand[..., 0], 0.0)
    np.testing.assert_allclose(np.asarray(found.logp)[:, 1:], expected, rtol=0, atol=1e-5)
    made = jax.eval_shape(mixed.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_models_of_other_vocabularies_are_refused(llama):
    mixed = models.mixture(llama[0], toys.chain())
    params = {"policy": llama[1], "reference": REFERENCE, "weight": np.float32(0.3)}
    with pytest.raises(
        ValueError, match=r"a mixture of vocabularies of 32 \(policy\) and 5 \(reference\); expected one"
    ):
        jax.eval_shape(mixed.logits, params, np.zeros((2, 21), np.float32))
