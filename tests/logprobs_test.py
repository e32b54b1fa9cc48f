import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import rows, small, tiny

from alignax import layouts, logprobs, losses

WANT = ("entropy", "correct", "logits", "mean_logp", "log_normalizer", "log_sum_p2", "ref_logp", "forward_kl")


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens, segments):
    return model.logits(params, model.hidden(params, tokens, segments).states)


def dense(model, params, tokens, segments, temperature):
    """Logits and log-probabilities of the whole row in numpy float64."""
    logits = np.asarray(all_logits(model, params, tokens, segments), np.float64) / temperature
    return logits, logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected_scores(model, params, reference, tokens, segments, temperature=1.0):
    """Shift, softmax and the rest in numpy."""
    logits, logp = dense(model, params, tokens, segments, temperature)
    _, ref_logp = dense(model, reference, tokens, segments, temperature)
    out = {name: np.zeros(tokens.shape) for name in ("logp", *WANT)}
    for b, t in np.ndindex(tokens.shape):
        if t == 0 or segments[b, t] == 0 or segments[b, t - 1] != segments[b, t]:
            continue
        before, token = logp[b, t - 1], tokens[b, t]
        out["logp"][b, t] = before[token]
        out["entropy"][b, t] = -np.sum(np.exp(before) * before)
        out["correct"][b, t] = token == before.argmax()
        out["logits"][b, t] = logits[b, t - 1].mean()
        out["mean_logp"][b, t] = before.mean()
        out["log_normalizer"][b, t] = np.log(np.exp(logits[b, t - 1]).sum())
        out["log_sum_p2"][b, t] = np.log(np.sum(np.exp(before) ** 2))
        ref = ref_logp[b, t - 1]
        out["ref_logp"][b, t] = ref[token]
        out["forward_kl"][b, t] = np.sum(np.exp(ref) * (ref - before))
    return out


@pytest.fixture(scope="module")
def batch():
    return rows(5)


score = jax.jit(logprobs.score, static_argnums=0, static_argnames=("want", "chunk"))
token_logprobs = jax.jit(logprobs.token_logprobs, static_argnums=0)


@pytest.mark.parametrize("chunk", [1, 7, 20, 256])  # one column at a time, blocks that do not divide, all at once
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_against_numpy(batch, chunk, temperature):
    model, params = small()
    reference = jax.tree.map(lambda x: 0.9 * np.asarray(x), params)
    tokens, segments = batch["tokens"], batch["segments"]
    options = {"temperature": temperature, "want": WANT, "reference": reference, "chunk": chunk}
    scores = score(model, params, tokens, segments, **options)
    expected = expected_scores(model, params, reference, tokens, segments, temperature)
    for name in ("logp", *WANT):
        np.testing.assert_allclose(getattr(scores, name), expected[name], rtol=1e-5, atol=2e-6, err_msg=name)
    assert scores.logp.dtype == jnp.float32


def test_only_what_is_wanted_is_there(batch):
    model, params = small()
    rows = (jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"]))
    scores = jax.eval_shape(lambda params: logprobs.score(model, params, *rows), params)
    assert scores.entropy is None and scores.correct is None and scores.logits is None


def test_the_mask_selects(batch):
    model, params = tiny()
    tokens, segments, mask = (batch[name] for name in ("tokens", "segments", "mask"))
    boolean = np.asarray(token_logprobs(model, params, tokens, segments != 0))
    whole = np.asarray(token_logprobs(model, params, tokens, segments))
    found = token_logprobs(model, params, tokens, segments, mask=mask)
    np.testing.assert_array_equal(found, np.where(mask, whole, 0))
    np.testing.assert_array_equal(boolean, whole)


def test_packed_rows_equal_rows_of_their_own():
    model, params = tiny()
    tokens = np.random.default_rng(0).integers(0, 32, (1, 10)).astype(np.int32)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]], np.int32)

    @jax.jit
    def of(params, tokens, segments):
        alone = (tokens[:, :4], jnp.ones((1, 4), bool)), (tokens[:, 4:7], jnp.ones((1, 3), bool))
        return [logprobs.token_logprobs(model, params, *row) for row in ((tokens, segments), *alone)]

    packed, first, second = map(np.asarray, of(params, tokens, segments))
    np.testing.assert_allclose(packed[:, :4], first, atol=1e-6)
    np.testing.assert_allclose(packed[:, 4:7], second, atol=1e-6)
    np.testing.assert_array_equal(packed[:, [0, 4, 7, 8, 9]], np.zeros((1, 5)))  # a first token has no predecessor


def test_a_completion_of_a_shared_prompt_starts_where_the_prompt_ends():
    model, params = tiny()
    tokens = np.random.default_rng(0).integers(0, 32, (1, 7)).astype(np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 0]], np.int32)
    parents = np.array([[0, 0, 0, 1, 1, 1, 0]], np.int32)

    @jax.jit
    def of(params, tokens, segments, parents):
        scores = logprobs.score(model, params, tokens, segments, parents=parents)
        return scores.logp, logprobs.token_logprobs(model, params, tokens, segments != 0)

    np.testing.assert_allclose(*of(params, tokens, segments, parents), atol=1e-6)


def test_gradient_equals_that_of_materialised_logits(batch):
    model, params = small()
    tokens, segments, mask = (jnp.asarray(batch[name]) for name in ("tokens", "segments", "mask"))

    def chunked(params):
        return jnp.sum(logprobs.score(model, params, tokens, segments, mask=mask, chunk=10).logp)

    def whole(params):
        logits = model.logits(params, model.hidden(params, tokens, segments).states)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(mask[:, 1:], logp, 0))

    ours, theirs = jax.jit(lambda params: (jax.grad(chunked)(params), jax.grad(whole)(params)))(params)
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), ours, theirs)


def test_no_array_of_the_size_of_all_logits():
    model, params = small()
    tokens = jnp.zeros((4, 512), jnp.int32)

    def loss(params):
        return jnp.sum(logprobs.token_logprobs(model, params, tokens, tokens == 0))

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    assert (
        "1x256x32xf32" in text and "512x32xf32" not in text and "2048x32xf32" not in text
    )  # the vocabulary has 32 tokens


def test_sides_may_have_different_layouts_and_padding_may_hold_anything(batch):
    model, params = tiny()
    tokens, segments, mask = (jnp.asarray(batch[name][:4]) for name in ("tokens", "segments", "mask"))
    forms = (model, model, layouts.packed(model, width=30, members=2), layouts.packed(model, width=50, members=4))
    garbage = jnp.where(mask, 1.0, jnp.nan)

    @jax.jit
    @jax.grad
    def gradient(params, which):
        teacher = jax.tree.map(lambda x: 0.9 * jax.lax.stop_gradient(x), params)
        sides = [logprobs.before(form, p, tokens, segments) for form, p in zip(forms, (params, teacher) * 2)]
        found = [
            logprobs.token_divergence(
                lambda p, q, x: x * losses.full_kl(p, q, jnp.ones(p.shape[:2])), (sides[i], sides[j]), mask, garbage
            )
            for i, j in ((0, 1), (0, 3), (2, 3))
        ]
        return jnp.sum(jnp.stack(found) * jnp.expand_dims(which, (1, 2)))

    one, *others = (gradient(params, row) for row in np.eye(3, dtype=np.float32))
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(one)) > 1e-3
    for other in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), one, other)


def test_bad_arguments_are_refused(batch):
    model, params = tiny()
    tokens, segments = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"])
    with pytest.raises(ValueError, match=r"want=\('entropi',\) is unknown; expected some of \('entropy'"):
        logprobs.score(model, params, tokens, segments, want=("entropi",))
    with pytest.raises(ValueError, match=r"temperature=0\.0; expected a number above 0"):
        logprobs.score(model, params, tokens, segments, temperature=0.0)
    with pytest.raises(AssertionError):
        logprobs.score(model, params, tokens, segments[:, :-1])


def test_the_reference_is_a_constant_and_must_be_there(batch):
    model, params = small()
    rows = (jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"]))

    def total(reference):
        scores = logprobs.score(model, params, *rows, want=("ref_logp", "forward_kl"), reference=reference)
        return jnp.sum(scores.forward_kl + scores.ref_logp)

    assert all(not np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(params)))
    with pytest.raises(ValueError, match=r"want=\('forward_kl',\) without a reference"):
        logprobs.score(model, params, *rows, want=("forward_kl",))


@pytest.mark.parametrize("chunk", [1, 256])
def test_divergence_of_two_heads(batch, chunk):
    model, params = small()
    reference = jax.tree.map(lambda x: 0.9 * np.asarray(x), params)
    tokens, segments, mask = (batch[name] for name in ("tokens", "segments", "mask"))

    @jax.jit
    def divergence(params, reference, tokens, segments, mask):
        sides = tuple(logprobs.before(model, p, tokens, segments) for p in (params, reference))
        return logprobs.token_divergence(
            lambda p, q: losses.full_kl(p, q, jnp.ones(p.shape[:2])), sides, mask, chunk=chunk
        )

    found = divergence(params, reference, tokens, segments, mask)
    (_, p), (_, q) = (dense(model, x, tokens, segments, 1.0) for x in (params, reference))
    expected = np.where(mask, np.roll(np.sum(np.exp(p) * (p - q), axis=-1), 1, axis=1), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6)
