"""Rows that share a prompt's cache against the forward pass without one, for every switch of a decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import models
from alignax.models import LayerKind, TransformerConfig

PLAIN = TransformerConfig(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
    max_positions=12,
)
GEMMA = {
    "num_layers": 3,
    "pattern": (LayerKind(window=2, rope_theta=10.0), LayerKind(window=3), LayerKind(rotary=False)),
    "post_norm": True,
    "centred_scales": True,
    "attention_softcap": 1.5,
    "logit_softcap": 2.0,
    "attention_scalar": 3.0,
    "scale_embeddings": True,
}
SWITCHES = {
    "llama": {},
    "gemma": GEMMA,
    "gpt2": {"learned_positions": True, "layer_norm": True, "mlp_bias": True, "out_bias": True, "gated_mlp": False},
    "parallel": {"parallel": True, "layer_norm": True, "rotary_fraction": 0.5, "qkv_bias": True},
    "olmo2": {"qk_norm_whole": True, "pre_norm": False, "post_norm": True, "num_kv_heads": 4},
    "mixture": {"mixture": True, "num_experts": 4, "qk_norm": True, "tie_embeddings": True, "num_kv_heads": 1},
}
GROUP, NEW = 3, 6
LENGTHS = np.array([4, 1, 3])  # the second shares nothing: its only token is the first that its rows are fed
PROMPTS = np.random.default_rng(3).integers(0, 19, (3, 4))
ROWS = np.random.default_rng(4).integers(0, 19, (9, 10))  # each row's prompt, then NEW tokens of its own
for row, own in enumerate(ROWS):
    length = LENGTHS[row // GROUP]
    own[:length] = PROMPTS[row // GROUP, :length]
ENDS = np.repeat(LENGTHS, GROUP) + NEW


def randomised(model):
    """Every leaf away from its initial value, and large enough that attention is far from uniform."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.2, 0.6, leaf.shape), jnp.float32), shapes)


@functools.cache
def built(name):
    model = models.transformer(dataclasses.replace(PLAIN, **SWITCHES[name]))
    return model, randomised(model)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params):
    """The logits of all rows without a cache."""
    segments = jnp.arange(ROWS.shape[1])[None] < jnp.asarray(ENDS)[:, None]
    hidden = model.hidden(params, jnp.asarray(ROWS, jnp.int32), segments.astype(jnp.int32))
    return model.logits(params, hidden.states)


def forked(model, params, slots=NEW):
    """The prompts once, shared but for their last token; what padding holds must not matter."""
    segments = jnp.arange(4)[None] < jnp.asarray(LENGTHS)[:, None]
    tokens = jnp.where(segments, jnp.asarray(PROMPTS, jnp.int32), 10**6)
    cache = jax.tree.map(lambda leaf: leaf + 3.0, model.init_cache(3, 4))  # nor what slots held before
    cache = model.hidden(params, tokens, segments.astype(jnp.int32), cache=cache).cache
    return model.fork(cache, jnp.asarray(LENGTHS, jnp.int32) - 1, GROUP, slots)


fork = jax.jit(forked, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 3))
def decode(model, params, cache, width):
    """NEW logits of each row, from its prompt's last token on, `width` tokens at a time."""

    def step(cache, offset):
        positions = jnp.asarray(ENDS, jnp.int32)[:, None] - NEW - 1 + offset + jnp.arange(width)[None]
        tokens = jnp.take_along_axis(jnp.asarray(ROWS, jnp.int32), positions, axis=1)
        hidden = model.hidden(params, tokens, jnp.ones_like(tokens), positions=positions, cache=cache)
        return hidden.cache, model.logits(params, hidden.states)

    logits = jax.lax.scan(step, cache, jnp.arange(0, NEW, width))[1]
    return logits.swapaxes(0, 1).reshape(len(ROWS), NEW, -1)


def expected(logits):
    """Those of the columns that decoding fills."""
    columns = ENDS[:, None] - NEW - 1 + np.arange(NEW)[None]
    return np.take_along_axis(np.asarray(logits), columns[..., None], axis=1)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, np.max(np.abs(wanted))))


@pytest.mark.parametrize("name", SWITCHES)
def test_forked_rows_equal_the_forward_pass(name):
    model, params = built(name)
    wanted = expected(forward(model, params))
    cache = fork(model, params)
    unrolled = jax.jit(model.unroll)(params)
    one = decode(model, unrolled, cache, 1)
    close(one, wanted)
    close(decode(model, unrolled, cache, 3), wanted)
    assert np.std(wanted[:GROUP, 1:], axis=0).mean() > 0.1  # the rows of a group do differ
    if name == "llama":
        np.testing.assert_array_equal(decode(model, params, cache, 1), one)


def test_slots_may_be_written_anew():
    """Three tokens, of which the last two are taken back and others put there."""
    model, params = built("gemma")
    start = (ENDS[:, None] - NEW - 1).astype(np.int32)

    @jax.jit
    def both(params):
        cache = forked(model, params)
        for offset, guess in ((0, 7), (1, None)):
            positions = start + offset + jnp.arange(3)[None]
            tokens = jnp.take_along_axis(jnp.asarray(ROWS, jnp.int32), positions, axis=1)
            tokens = tokens if guess is None else tokens.at[:, 1:].set(guess)
            hidden = model.hidden(params, tokens, jnp.ones_like(tokens), positions=positions, cache=cache)
            cache = hidden.cache
        return model.logits(params, hidden.states)

    close(both(params), expected(forward(model, params))[:, 1:4])


def test_models_of_models_fork_too():
    base, params = built("llama")
    wanted = expected(forward(base, params))
    scored = models.with_score(base)
    both = models.add_score(base, params, jax.random.key(1), keep_head=True)
    cache = fork(scored, both)
    close(decode(scored, jax.jit(scored.unroll)(both), cache, 3), wanted)
    with pytest.raises(ValueError, match="expected 'backbone' and 'score'"):
        scored.unroll(params)
    mixed = models.mixture(base)
    other = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[..., ::-1]), params)
    parts = {"policy": params, "reference": other, "weight": np.float32(0.25)}
    cache = fork(mixed, parts)
    found = decode(mixed, jax.jit(mixed.unroll)(parts), cache, 1)
    close(found, 0.75 * wanted + 0.25 * expected(forward(base, other)))


def bytes_of(tree, rows):
    leaves = (leaf for leaf in jax.tree.leaves(tree) if leaf.ndim == 4 and leaf.shape[0] == rows)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("group", [2, 8])
def test_a_prompt_is_stored_once(group, dtype):
    config = dataclasses.replace(PLAIN, dtype=dtype)
    model = models.transformer(config)
    prompts, width, slots = 5, 64, 16
    lengths = jnp.ones(prompts, jnp.int32)
    cache = jax.eval_shape(lambda: model.fork(model.init_cache(prompts, width), lengths, group, slots))
    # keys and values of 2 layers x 2 heads x 4 channels
    of_a_slot = 2 * 2 * 2 * 4 * jnp.dtype(dtype).itemsize
    assert bytes_of(cache, prompts) == prompts * width * of_a_slot
    assert bytes_of(cache, prompts * group) == prompts * group * slots * of_a_slot
    everything = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert everything == (prompts * width + prompts * group * slots) * of_a_slot + 4 * prompts  # and the lengths


def test_refuses_rows_that_are_not_the_caches():
    model, params = built("llama")
    cache, tokens = fork(model, params), jnp.asarray(np.zeros((3, 1), np.int32))
    with pytest.raises(ValueError, match=r"a forked cache of 9 rows got tokens of \(3, 1\), positions \(3, 1\)"):
        model.hidden(params, tokens, tokens, positions=tokens, cache=cache)
    with pytest.raises(ValueError, match=r"a forked cache of 9 rows got tokens of \(9, 1\), positions None"):
        model.hidden(params, *(jnp.asarray(np.ones((9, 1), np.int32)),) * 2, cache=cache)
