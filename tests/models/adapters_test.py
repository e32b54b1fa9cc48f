"""Adapted networks against numpy: a causal mean of embeddings, written as a function, a linen and an nnx module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from alignax import logprobs, sampling
from alignax.models import from_apply, from_linen, from_nnx

V, D = 7, 4
TOKENS = np.array([[3, 1, 4, 1, 5], [2, 6, 0, 0, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def causal_mean(x, segments):
    """The mean of the tokens j <= i that are not padding: a body that sees all of its past."""
    real = (segments != 0).astype(x.dtype)[:, :, None]
    return jnp.cumsum(x * real, axis=1) / jnp.maximum(jnp.cumsum(real, axis=1), 1)


class Linen(nn.Module):
    dropout: float = 0.0

    def setup(self):
        self.embed = nn.Embed(V, D)
        self.out = nn.Dense(V)
        self.drop = nn.Dropout(self.dropout)

    def states(self, tokens, segments):
        x = causal_mean(self.embed(tokens), segments)
        return self.drop(x, deterministic=not self.has_rng("dropout"))

    def logits(self, states):
        return self.out(states)

    def __call__(self, tokens, segments):
        return self.logits(self.states(tokens, segments))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.out = nnx.Linear(D, V, rngs=rngs)
        self.steps = nnx.Variable(jnp.zeros(()))  # state that is no parameter

    def states(self, tokens, segments):
        return causal_mean(self.embed(tokens), segments)

    def logits(self, states):
        return self.out(states)

    def __call__(self, tokens, segments):
        return self.logits(self.states(tokens, segments))


def function(params, tokens, segments):
    return causal_mean(params["embed"]["embedding"][tokens], segments) @ params["out"]["kernel"] + bias(params)


def bias(params):
    return params["out"]["bias"][None, None]


def init(key):
    return Linen().init(key, TOKENS, SEGMENTS)["params"]


MODELS = {
    "function": lambda: from_apply(function, init=init),
    "function_head": lambda: from_apply(
        lambda params, tokens, segments: causal_mean(params["embed"]["embedding"][tokens], segments),
        init=init,
        head=lambda params, states: (
            states @ params["out"]["kernel"] + jnp.expand_dims(params["out"]["bias"], range(states.ndim - 1))
        ),
    ),
    "linen": lambda: from_linen(Linen()),
    "linen_head": lambda: from_linen(Linen(), body=Linen.states, head=Linen.logits),
    "nnx": lambda: from_nnx(Nnx(nnx.Rngs(0))),
    "nnx_head": lambda: from_nnx(Nnx(nnx.Rngs(0)), body=Nnx.states, head=Nnx.logits),
}


@pytest.fixture(params=MODELS)
def adapted(request, key):
    """A model and parameters with the same paths in each; the bias moved away from zero."""
    model = MODELS[request.param]()
    move = lambda leaf: np.asarray(leaf) + np.linspace(-1, 1, leaf.size, dtype=np.float32).reshape(leaf.shape)  # noqa: E731
    params = jax.tree.map(lambda leaf: jnp.asarray(move(leaf)), model.init(key))
    assert {k: set(v) for k, v in params.items()} == {"embed": {"embedding"}, "out": {"kernel", "bias"}}
    return model, params


def expected_logits(params, row):
    table, kernel, shift = (np.asarray(leaf, np.float64) for leaf in flat(params))
    return np.stack([np.mean(table[row[: i + 1]], axis=0) for i in range(len(row))]) @ kernel + shift


def flat(params):
    return params["embed"]["embedding"], params["out"]["kernel"], params["out"]["bias"]


def test_logits(adapted):
    model, params = adapted

    @jax.jit
    def forward(params, tokens, segments):
        hidden = model.hidden(params, tokens, segments)
        return hidden, model.logits(params, hidden.states)

    hidden, logits = forward(params, TOKENS, SEGMENTS)
    assert logits.dtype == jnp.float32 and hidden.cache is None and hidden.aux == {}
    for row, segments, found in zip(TOKENS, SEGMENTS, np.asarray(logits)):
        real = segments.sum()
        np.testing.assert_allclose(found[:real], expected_logits(params, row[:real]), atol=1e-6)


def test_gradients(adapted):
    """Of a sum of logits, in closed form: the bias counts tokens, the kernel adds up the means."""
    model, params = adapted

    def total(params):
        hidden = model.hidden(params, jnp.asarray(TOKENS[:1]), jnp.asarray(SEGMENTS[:1]))
        return jnp.sum(model.logits(params, hidden.states))

    table, kernel, shift = flat(jax.jit(jax.grad(total))(params))
    params = jax.device_get(params)
    weights = np.zeros((5, V))
    for i, j in zip(*np.tril_indices(5)):
        weights[i, TOKENS[0, j]] += 1 / (i + 1)
    old_table, old_kernel, _ = flat(params)
    np.testing.assert_allclose(shift, np.full(V, 5.0), rtol=1e-6)
    np.testing.assert_allclose(kernel, np.tile((weights @ old_table).sum(0)[:, None], (1, V)), rtol=1e-5)
    np.testing.assert_allclose(table, np.outer(weights.sum(0), old_kernel.sum(1)), rtol=1e-5, atol=1e-6)


def test_decoding_runs_the_prefix_again(adapted):
    """A ragged prefill, then tokens one by one, the second row ahead of its padding."""
    model, params = adapted
    prompts = np.array([[3, 1, 4], [2, 6, 9]]), np.array([[1, 1, 1], [1, 1, 0]])
    later = np.array([[[1], [0]], [[5], [4]]]), np.array([[[3], [2]], [[4], [3]]])  # tokens and their positions

    @jax.jit
    def decode(params, prompts, later):
        hidden = model.hidden(params, *prompts, cache=model.init_cache(2, 6) + 5)
        logits = model.logits(params, hidden.states)
        for fed, positions in zip(*later):
            hidden = model.hidden(params, fed, jnp.ones_like(fed), positions=positions, cache=hidden.cache)
        return logits, model.logits(params, hidden.states)[:, 0]

    logits, found = map(np.asarray, decode(params, prompts, later))
    np.testing.assert_allclose(logits[0], expected_logits(params, [3, 1, 4]), atol=1e-6)
    np.testing.assert_allclose(logits[1, :2], expected_logits(params, [2, 6]), atol=1e-6)
    np.testing.assert_allclose(found[0], expected_logits(params, [3, 1, 4, 1, 5])[-1], atol=1e-6)
    np.testing.assert_allclose(found[1], expected_logits(params, [2, 6, 0, 4])[-1], atol=1e-6)


def test_any_function_can_be_sampled_from(key):
    model = from_apply(function, init=init)

    @jax.jit
    def run(key, prompts, lengths):
        params = model.init(key)
        samples = sampling.generate(model, params, prompts, lengths, key, max_new_tokens=4)
        return samples, logprobs.token_logprobs(model, params, samples.tokens, samples.segments, mask=samples.mask)

    samples, logp = run(key, np.array([[3, 1, 4], [2, 6, 0]]), np.array([3, 2]))
    assert np.sum(samples.mask) == 8
    np.testing.assert_allclose(samples.logp, logp, atol=1e-6)


def test_a_key_is_the_linen_modules_dropout_key(key):
    model = from_linen(Linen(dropout=0.5))
    params, rows = jax.jit(model.init)(key), (TOKENS, SEGMENTS)
    run = jax.jit(lambda key: model.hidden(params, *map(jnp.asarray, rows), key=key).states)
    assert np.array_equal(run(None), run(None)) and np.array_equal(run(key), run(key))
    assert not np.array_equal(run(key), run(None)) and not np.array_equal(run(key), run(jax.random.key(9)))


def test_nnx_parameters_are_copies(key):
    module = Nnx(nnx.Rngs(0))
    model = from_nnx(module)
    jax.tree.map(lambda leaf: leaf.delete(), model.init(key))  # as donation does
    np.testing.assert_array_equal(model.init(key)["out"]["kernel"], module.out.kernel[...])


def test_refusals(key):
    model, tokens = from_apply(function), jnp.asarray(TOKENS)
    with pytest.raises(ValueError, match="made without an init"):
        model.init(key)
    for extra in ("parents", "positions"):
        with pytest.raises(ValueError, match="it takes no parents and no positions"):
            model.hidden({}, tokens, tokens, **{extra: tokens})

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, tokens, segments):
            return nn.BatchNorm(use_running_average=False)(nn.Embed(V, V)(tokens))

    with pytest.raises(ValueError, match=r"\['batch_stats', 'params'\]; expected 'params' only"):
        from_linen(Normed()).init(key)
