"""Contrastive decoding against its formula on two known distributions, and two transformers of different size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from problems import VOCAB, tiny
from references import toys

from alignax import logprobs, models, sampling

EXPERT, AMATEUR = (np.random.default_rng(seed).normal(size=(5, 5)).astype(np.float32) for seed in (0, 1))


def contrast(logits, weight, plausibility):
    """Logits in float64, from the probabilities of expert and amateur."""
    p, q = (np.exp(toys.log_softmax(x)) for x in logits)
    with np.errstate(divide="ignore"):
        return np.where(
            p >= plausibility * p.max(axis=-1, keepdims=True), np.log(p ** (1 + weight) / q**weight), -np.inf
        )


@functools.cache
def sampler(model, group, new_tokens):
    return jax.jit(functools.partial(sampling.generate, model, group=group, max_new_tokens=new_tokens))


@functools.cache
def amateur():
    """A transformer that shares nothing with `tiny` but the vocabulary."""
    config = models.TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=16,
        num_layers=1,
        num_heads=3,
        num_kv_heads=1,
        head_dim=6,
        max_positions=12,
        initializer_range=0.4,
        tie_embeddings=True,
    )
    model = models.transformer(config)
    return model, drawn(model, 0.4)


def params_of(expert, amateur, weight, plausibility):
    arrays = {"weight": np.float32(weight), "plausibility": np.float32(plausibility)}
    return {"expert": expert, "amateur": amateur} | arrays


@pytest.mark.parametrize(("weight", "plausibility"), [(0.0, 0.0), (0.5, 0.1), (2.0, 0.3), (0.0, 0.4), (1.0, 1.0)])
def test_samples_follow_the_contrast_token_by_token(weight, plausibility):
    params = params_of(EXPERT, AMATEUR, weight, plausibility)
    expected = toys.log_softmax(contrast((EXPERT, AMATEUR), weight, plausibility) / 0.8)
    sample = sampler(chains(), 2000, 3)
    found = sample(params, np.array([[2, 0], [4, 1]]), np.array([1, 2]), jax.random.key(3), temperature=0.8)
    tokens, mask, counts = np.asarray(found.tokens), np.asarray(found.mask), np.zeros((5, 5))
    for t in range(1, tokens.shape[1]):
        here = mask[:, t]
        logp = expected[tokens[here, t - 1], tokens[here, t]]
        np.testing.assert_allclose(np.asarray(found.logp)[here, t], logp, rtol=0, atol=1e-5)
        np.add.at(counts, (tokens[here, t - 1], tokens[here, t]), 1)
    wanted = counts.sum(axis=1, keepdims=True) * np.exp(expected)
    assert counts.sum() == 12000 and not counts[np.isneginf(expected)].any()
    chi = np.sum((counts - wanted) ** 2 / np.maximum(wanted, 1e-9))
    assert chi < 20 + 5 * 40**0.5  # 20 degrees of freedom at most; 5 standard deviations


@functools.cache
def chains():
    """One model, so that one program samples from it whatever the numbers."""
    return models.contrastive(toys.chain(), toys.chain()._replace(config={"name": "another"}))


@functools.cache
def two():
    """The contrast, its parameters, and rows [R, T] -> the logits of both [R, T, V]."""
    (large, p), (small, q) = tiny(), amateur()
    model = models.contrastive(large, small)
    forward = jax.jit(lambda *rows: [m.logits(w, m.hidden(w, *rows).states) for m, w in ((large, p), (small, q))])
    return model, params_of(p, q, 0.7, 0.2), forward


PROMPTS = np.array([[3, 1, 4, 0], [2, 6, 9, 5]]), np.array([3, 4])


def test_two_transformers_cached_steps_are_their_forward_passes():
    model, params, forward = two()
    assert model.fork and model.unroll and model.config.max_positions == 12
    found = sampler(model, 2, 6)(params, *PROMPTS, jax.random.key(0), temperature=0.8)
    rows = (found.tokens, found.segments)
    logits = contrast(forward(*rows), 0.7, 0.2)[:, :-1] / 0.8
    by_hand = np.take_along_axis(toys.log_softmax(logits), np.asarray(found.tokens)[:, 1:, None], axis=2)[..., 0]
    mask = np.asarray(found.mask)[:, 1:]
    assert mask.sum() == 24
    np.testing.assert_allclose(np.asarray(found.logp)[:, 1:][mask], by_hand[mask], rtol=0, atol=1e-5)
    score = jax.jit(functools.partial(logprobs.token_logprobs, model))
    scores = score(params, *rows, mask=found.mask, temperature=0.8)
    np.testing.assert_allclose(found.logp, scores, rtol=0, atol=1e-5)


def test_greedy_is_the_plain_loop():
    model, params, forward = two()
    found = sampler(model, 2, 6)(params, *PROMPTS, jax.random.key(0), temperature=0.0)
    tokens, ends = np.zeros((4, 10), np.int32), np.array([3, 3, 4, 4])
    tokens[:, :4] = np.repeat(PROMPTS[0], 2, axis=0)
    for _ in range(6):
        logits = contrast(forward(tokens, np.arange(10)[None] < ends[:, None]), 0.7, 0.2)
        tokens[np.arange(4), ends] = np.argmax(logits[np.arange(4), ends - 1], axis=1)
        ends += 1
    np.testing.assert_array_equal(found.tokens, tokens)


def test_a_beam_search_over_both():
    model, params, forward = two()
    search = jax.jit(functools.partial(sampling.beam_search, model, beams=3, max_new_tokens=6, keep=3))
    found = search(params, *PROMPTS)
    logits = contrast(forward(found.samples.tokens, found.samples.segments), 0.7, 0.2)[:, :-1]
    logp = np.take_along_axis(toys.log_softmax(logits), np.asarray(found.samples.tokens)[:, 1:, None], axis=2)[..., 0]
    mean = np.where(np.asarray(found.samples.mask)[:, 1:], logp, 0.0).sum(axis=1) / 6
    np.testing.assert_allclose(found.scores, mean, rtol=0, atol=1e-5)


def test_where_only_one_can_fork_the_caches_are_repeated():
    model, params, _ = two()
    members = tiny()[0]._replace(fork=None, unroll=None), amateur()[0]
    mixed = models.contrastive(*members)
    assert mixed.fork is None and mixed.unroll
    mirrored = models.contrastive(*members[::-1])
    assert mirrored.fork is None and mirrored.unroll
    forked, repeated = (sampler(m, 2, 6)(params, *PROMPTS, jax.random.key(1), temperature=1.0) for m in (model, mixed))
    np.testing.assert_array_equal(forked.tokens, repeated.tokens)
    np.testing.assert_allclose(forked.logp, repeated.logp, rtol=0, atol=1e-5)
    assert models.contrastive(*(m._replace(fork=None, unroll=None) for m in members)).unroll is None


def test_other_numbers_compile_nothing():
    traces = []

    @jax.jit
    def score(params):
        traces.append(1)
        model, tokens = two()[0], jnp.ones((1, 4), jnp.int32)
        return model.logits(params, model.hidden(params, tokens, tokens).states)

    found = [score(two()[1] | {"weight": np.float32(a), "plausibility": np.float32(0.1)}) for a in (0.1, 0.9)]
    assert len(traces) == 1 and not np.allclose(*found)


def test_edges_of_the_formula():
    expert, amateur = np.float32([0.0, -np.inf, 1.0, 0.9]), np.float32([-np.inf, 0.0, 2.0, 2.0])
    mix = jax.jit(models.contrastive_logits)
    np.testing.assert_array_equal(mix(expert, amateur, weight=0.0, plausibility=0.0), expert)
    np.testing.assert_allclose(mix(expert, amateur, weight=0.5, plausibility=0.8), [-np.inf, -np.inf, 0.5, 0.35], 1e-6)
    np.testing.assert_allclose(mix(expert, amateur, weight=0.5, plausibility=1.0), [-np.inf, -np.inf, 0.5, -np.inf])
    assert np.isnan(mix(np.float32([np.nan, 0.0]), np.zeros(2, np.float32))).any()
    half = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    assert jax.eval_shape(mix, half, half).dtype == jnp.float32


@pytest.mark.parametrize(
    ("message", "keywords"),
    [
        (r"weight=-0\.1; expected 0 or more", {"weight": -0.1}),
        (r"weight=nan; expected 0 or more", {"weight": float("nan")}),
        (r"weight=inf; expected 0 or more", {"weight": jnp.float32(np.inf)}),
        (r"plausibility=1\.5; expected 0 to 1", {"plausibility": 1.5}),
        (r"plausibility=nan; expected 0 to 1", {"plausibility": jnp.float32(np.nan)}),
    ],
)
def test_numbers_out_of_range_are_refused(message, keywords):
    with pytest.raises(ValueError, match=f"contrastive_logits: {message}"):
        models.contrastive_logits(jnp.asarray(EXPERT), jnp.asarray(AMATEUR), **keywords)


def test_what_it_is_as_a_model():
    model, params, _ = two()
    made = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure(params)
    assert made["expert"]["embed"]["embedding"].shape == (VOCAB, 16)
    assert made["amateur"]["embed"]["embedding"].shape == (VOCAB, 24)
    with pytest.raises(
        ValueError, match=r"a contrast got parameters \['amateur', 'expert'\]; expected \('expert', 'ama"
    ):
        model.hidden({name: params[name] for name in ("amateur", "expert")}, *(jnp.asarray([[1, 1]]),) * 2)


def test_other_vocabularies_are_refused():
    model, params = models.contrastive(tiny()[0], toys.chain()), two()[1] | {"amateur": AMATEUR}
    with pytest.raises(
        ValueError, match=r"a contrast of vocabularies of 32 \(expert\) and 5 \(amateur\); expected one"
    ):
        sampler(model, 1, 2)(params, *PROMPTS, jax.random.key(0))
