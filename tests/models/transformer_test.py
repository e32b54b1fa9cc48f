"""The decoder against loops in numpy, family by family, and against itself: packed, cached, sharded, recomputed."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn
from references import transformer as reference

from alignax import models
from alignax.models import LayerKind, Llama3Scaling, TransformerConfig
from alignax.models.transformer import _embed

DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
LLAMA = TransformerConfig(
    vocab_size=19,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rope_theta=100.0,
)
SCALING = Llama3Scaling(factor=8.0, original_max_positions=32)
SCALED = reference.llama3_frequencies(4, 100.0, factor=8.0, low=1.0, high=4.0, original=32)
FAMILIES = {
    "llama": (LLAMA, None),
    "one_head_each": (dataclasses.replace(LLAMA, num_kv_heads=4), None),
    "llama3": (dataclasses.replace(LLAMA, rope_scaling=SCALING, tie_embeddings=True), SCALED),
    "qwen2": (dataclasses.replace(LLAMA, qkv_bias=True, tie_embeddings=True), None),
    "qwen3": (dataclasses.replace(LLAMA, qk_norm=True, head_dim=6, num_kv_heads=1), None),
    "mistral": (dataclasses.replace(LLAMA, pattern=(LayerKind(window=3),)), None),
}
DIFFERENT = ["llama3", "qwen2", "qwen3"]  # where each switch is on once and off once
# Kinds of layer that take turns with a remainder, and every switch that needs no other decoder.
GEMMA = dataclasses.replace(
    LLAMA,
    num_layers=5,
    pattern=(LayerKind(window=2, rope_theta=10.0), LayerKind(window=2, rope_theta=10.0), LayerKind(rotary=False)),
    post_norm=True,
    centred_scales=True,
    attention_softcap=1.5,
    logit_softcap=2.0,
    attention_scalar=3.0,
    scale_embeddings=True,
)
GPT2 = dataclasses.replace(
    LLAMA, max_positions=8, learned_positions=True, layer_norm=True, mlp_bias=True, out_bias=True, gated_mlp=False
)
LENGTHS = (7, 4, 5)
TOKENS = np.random.default_rng(3).integers(0, 19, (3, 7))
SEGMENTS = (np.arange(7)[None, :] < np.array(LENGTHS)[:, None]).astype(np.int32)


@pytest.fixture(params=FAMILIES)
def family(request):
    config, scaled = FAMILIES[request.param]
    return config, reference.frequencies(config.head_dim, config.rope_theta) if scaled is None else scaled


transformer = functools.cache(models.transformer)  # one model per configuration, so that each compiles once


@functools.cache
def random_params(config):
    """Every leaf away from its initial value, and large enough that attention is far from uniform."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.7, leaf.shape), jnp.float32), shapes)


def forward(model, params, tokens, segments, **extra):
    tokens, segments = jnp.asarray(tokens, jnp.int32), jnp.asarray(segments)
    return _forward(model, params, tokens, segments, **{k: jnp.asarray(v, jnp.int32) for k, v in extra.items()})


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens, segments, **extra):
    return model.logits(params, model.hidden(params, tokens, segments, **extra).states)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, tokens, segments):
    """Of the sum of -log p of every token that is not padding."""

    def loss(params):
        logp = jax.nn.log_softmax(_forward(model, params, tokens, segments))
        chosen = jnp.take_along_axis(logp[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(segments[:, 1:] != 0, chosen, 0.0))

    return jax.grad(loss)(params)


def expected_logits(config, frequencies, params, tokens, segments=None, parents=None):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    positions, sees = reference.layout([1] * len(tokens) if segments is None else segments, parents)
    window = config.pattern[0].window or len(tokens)
    sees = [[j for j in seen if positions[j] > positions[i] - window] for i, seen in enumerate(sees)]
    numbers = {"heads": config.num_heads, "kv_heads": config.num_kv_heads, "eps": config.norm_eps}
    return reference.logits(params, tokens, positions=positions, sees=sees, frequencies=frequencies, **numbers)


def close(found, expected, rtol=2e-6):
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.max(np.abs(expected)))


def test_logits_of_every_family(family):
    config, frequencies = family
    params = random_params(config)
    found = forward(transformer(config), params, TOKENS, SEGMENTS)
    assert found.dtype == jnp.float32
    assert np.all(np.isfinite(found))  # on padding too
    for row, length in enumerate(LENGTHS):
        close(found[row, :length], expected_logits(config, frequencies, params, TOKENS[row, :length]))


@pytest.mark.parametrize("family", DIFFERENT, indirect=True)
def test_gradient(family):
    """Along three directions, against central differences of the numpy loop."""
    config, frequencies = family
    params = random_params(config)
    grads = gradient(transformer(config), params, TOKENS[:1, :4], SEGMENTS[:1, :4])

    def numpy_loss(params):
        logits = expected_logits(config, frequencies, params, TOKENS[0, :4])[:-1]
        return -sum(row[token] - np.log(np.sum(np.exp(row))) for row, token in zip(logits, TOKENS[0, 1:4]))

    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
        ahead, behind = (
            numpy_loss(jax.tree.map(lambda leaf, by: np.asarray(leaf, np.float64) + step * by, params, direction))
            for step in (1e-5, -1e-5)
        )
        along = sum(np.sum(g * by) for g, by in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
        np.testing.assert_allclose(along, (ahead - behind) / 2e-5, rtol=2e-5, atol=2e-4)


PACKED = np.random.default_rng(5).integers(0, 19, (1, 12))
PACKED_SEGMENTS = [1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 0, 0]
PACKED_PARENTS = [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_a_packed_row_with_parents_of_every_family(family):
    config, frequencies = family
    params = random_params(config)
    found = forward(transformer(config), params, PACKED, [PACKED_SEGMENTS], parents=[PACKED_PARENTS])[0, :10]
    row = (PACKED[0, :10], PACKED_SEGMENTS[:10], PACKED_PARENTS[:10])
    close(found, expected_logits(config, frequencies, params, *row))


def test_a_packed_row_equals_separate_rows_and_parents_equal_concatenation():
    params = random_params(LLAMA)
    found = forward(transformer(LLAMA), params, PACKED, [PACKED_SEGMENTS], parents=[PACKED_PARENTS])[0]
    for own in ([0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7], [8, 9]):  # prompt and completion, prompt and completion, a part
        row = np.pad(PACKED[:, own], ((0, 0), (0, 6 - len(own))))
        alone = forward(transformer(LLAMA), params, row, np.arange(6)[None] < len(own))[0, : len(own)]
        close(found[jnp.array(own)], alone)


def test_positions_override_those_of_the_segments():
    params = random_params(LLAMA)
    positions = np.array([[3, 4, 5, 9, 10, 11, 30]])
    found = forward(transformer(LLAMA), params, TOKENS[:1], SEGMENTS[:1], positions=positions)[0]
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    numbers = {"heads": 4, "kv_heads": 2, "eps": 1e-5, "frequencies": reference.frequencies(4, 100.0)}
    close(found, reference.logits(params, TOKENS[0], positions=positions[0], **numbers))


def test_padding_changes_nothing():
    model, params = transformer(LLAMA), random_params(LLAMA)
    garbage = np.where(SEGMENTS != 0, TOKENS, 10**6)  # an id that no embedding has
    longer = np.pad(garbage, ((0, 1), (0, 5)), constant_values=-1)  # and a row of nothing else
    segments = np.pad(SEGMENTS, ((0, 1), (0, 5)))
    short, long = (forward(model, params, *pair) for pair in ((TOKENS, SEGMENTS), (longer, segments)))
    assert np.all(np.isfinite(long))
    for row, length in enumerate(LENGTHS):
        close(long[row, :length], short[row, :length])
    pairs = ((TOKENS, SEGMENTS), (np.where(segments != 0, longer, 18), segments))
    grads = [gradient(model, params, *pair) for pair in pairs]
    jax.tree.map(close, grads[1], grads[0])


def test_padding_has_no_gradient():
    """Of its own embedding: token 18 stands on padding only."""
    tokens = np.where(SEGMENTS != 0, TOKENS % 18, 18)
    grads = gradient(transformer(LLAMA), random_params(LLAMA), tokens, SEGMENTS)["embed"]["embedding"]
    assert not np.any(grads[18]) and np.any(grads[:18])


def test_boolean_segments_are_one_segment():
    model, params = transformer(LLAMA), random_params(LLAMA)
    found, expected = (forward(model, params, TOKENS, segments) for segments in (SEGMENTS != 0, SEGMENTS))
    np.testing.assert_array_equal(found, expected)


def test_an_unknown_token_is_loud():
    tokens = np.where(np.arange(7)[None] == np.array([[6], [9], [9]]), 19, TOKENS)
    found = forward(transformer(LLAMA), random_params(LLAMA), tokens, np.ones_like(tokens))
    assert np.all(np.isnan(found[0])) and np.all(np.isfinite(found[1:]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=5)
def cached(model, params, tokens, segments, positions, cache):
    hidden = model.hidden(params, tokens, segments, positions=positions, cache=cache)
    return model.logits(params, hidden.states), hidden.cache


def decode(model, params, tokens, cache, *, first, lengths, last):
    """Feeds each row its next token until its length `last`, then its final one again, as a sampler does."""
    found = []
    for offset in range(max(last) - min(lengths)):
        positions = jnp.minimum(jnp.array(lengths) + offset, jnp.array(last) - 1)[:, None]
        fed = jnp.take_along_axis(jnp.asarray(tokens), positions, axis=1)
        step, cache = cached(model, params, fed, jnp.ones_like(fed), positions, cache)
        found.append((positions[:, 0], step[:, 0]))
    logits = np.array(first)
    for positions, values in found:
        logits[np.arange(len(tokens)), np.asarray(positions)] = values
    return logits


@pytest.mark.parametrize(
    "family, explicit", [*((name, False) for name in FAMILIES), ("llama", True)], indirect=["family"]
)
def test_ragged_prefill_and_decoding_equal_the_full_forward(family, explicit):
    config, _ = family
    model, params = transformer(config), random_params(config)
    prompts, width = (3, 1, 2), 3
    segments = (np.arange(width)[None, :] < np.array(prompts)[:, None]).astype(np.int32)
    tokens = jnp.asarray(np.where(segments != 0, TOKENS[:, :width], 5), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape) if explicit else None
    cache = jax.tree.map(lambda leaf: leaf + 3.0, model.init_cache(3, 9))  # what slots held before must not matter
    first, cache = cached(model, params, tokens, jnp.asarray(segments), positions, cache)
    first = np.pad(first, ((0, 0), (0, 4), (0, 0)))
    found = decode(model, params, TOKENS, cache, first=first, lengths=prompts, last=LENGTHS)
    expected = forward(model, params, TOKENS, SEGMENTS)
    for row, length in enumerate(LENGTHS):
        close(found[row, :length], expected[row, :length])


def test_remat_changes_memory_only():
    tokens, segments, params = np.tile(TOKENS, (4, 4)), np.tile(SEGMENTS, (4, 4)), random_params(LLAMA)
    grads, memory = [], []
    for remat in (None, DOTS):
        model = transformer(dataclasses.replace(LLAMA, remat=remat))
        compiled = gradient.lower(model, params, tokens, segments).compile()
        grads.append(compiled(params, tokens, segments))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    jax.tree.map(close, grads[1], grads[0])
    assert memory[1] < 0.8 * memory[0]


def bfloat16_model(param_dtype):
    """A model that computes in bfloat16, its parameters, and the logits of the same numbers in float32."""
    config = dataclasses.replace(LLAMA, qkv_bias=True, qk_norm=True)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), random_params(config))
    full = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    expected = forward(transformer(config), full, TOKENS, SEGMENTS)
    return transformer(dataclasses.replace(config, dtype=jnp.bfloat16, param_dtype=param_dtype)), params, expected


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(param_dtype):
    """Logits stay float32, and within what bfloat16 rounds."""
    model, params, expected = bfloat16_model(param_dtype)
    found = forward(model, params, TOKENS, SEGMENTS)
    assert found.dtype == jnp.float32
    assert np.any(found.astype(jnp.bfloat16).astype(jnp.float32) != found)  # not rounded and cast back
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_bfloat16_cache_and_gradient():
    model, params, expected = bfloat16_model(jnp.bfloat16)
    first, cache = cached(model, params, TOKENS, SEGMENTS, None, model.init_cache(3, 7))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert np.linalg.norm(first[0] - expected[0]) < 0.05 * np.linalg.norm(expected[0])
    grads = gradient(model, params, TOKENS, SEGMENTS)
    assert all(leaf.dtype == jnp.bfloat16 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_layers_of_several_kinds_recompute_to_the_same_gradient():
    params, grads = random_params(GEMMA), []
    for remat in (None, DOTS):
        model = transformer(dataclasses.replace(GEMMA, remat=remat))
        grads.append(gradient(model, params, TOKENS, SEGMENTS))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads[-1]))
    jax.tree.map(close, grads[1], grads[0])


def test_more_layers_make_no_larger_program():
    sizes = []
    for layers in (5, 50):
        model = transformer(dataclasses.replace(GEMMA, num_layers=layers))
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        program = jax.make_jaxpr(lambda params: model.hidden(params, *map(jnp.asarray, (TOKENS, SEGMENTS))).states)(
            shapes
        )
        sizes.append(len(str(program).splitlines()))
    assert sizes[0] == sizes[1]


def test_scaled_embeddings_are_rounded_to_the_compute_dtype_first():
    """The square root of 3072 is 55.43, and 55.5 in bfloat16: the scale that Gemma was trained with."""
    table = {"embed": {"embedding": jnp.full((19, 3072), 0.5)}}
    config = dataclasses.replace(GEMMA, hidden_size=3072, dtype=jnp.bfloat16)
    found = _embed(config, table, jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    assert found.dtype == jnp.bfloat16 and np.all(np.asarray(found, np.float32) == 27.75)


def test_a_row_longer_than_the_learned_positions_is_loud():
    model, params = transformer(GPT2), random_params(GPT2)
    tokens = jnp.ones((1, 9), jnp.int32)
    with pytest.raises(ValueError, match="a prompt of 9 tokens; the model has 8 learned positions"):
        model.hidden(params, tokens, tokens, cache=model.init_cache(1, 9))
    assert np.all(np.isnan(forward(model, params, tokens, tokens)[0, 8]))
    packed = forward(model, params, tokens, jnp.array([[1, 1, 1, 1, 1, 2, 2, 2, 2]]))
    assert np.all(np.isfinite(packed))


@pytest.mark.parametrize("config", [GEMMA, GPT2])
def test_init_of_norms_biases_and_positions(config):
    params = jax.jit(transformer(config).init)(jax.random.key(0))
    for path, leaf in leaves(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("scale"):
            assert np.all(leaf == (0 if config.centred_scales else 1)), name
        elif name.endswith("bias"):
            assert np.all(leaf == 0), name
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves(params)}
    assert names.get("positions/embedding") == ((8, 8) if config is GPT2 else None)
    assert ("layers/mlp/gate/kernel" in names) == (config is GEMMA)
    assert names.get("final_norm/bias") == ((8,) if config is GPT2 else None)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_init_creates_param_dtype(param_dtype):
    shapes = jax.eval_shape(transformer(dataclasses.replace(LLAMA, param_dtype=param_dtype)).init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(param_dtype)}


@pytest.mark.parametrize("family", DIFFERENT, indirect=True)
def test_init(family):
    config, _ = family
    config = dataclasses.replace(config, hidden_size=64, intermediate_size=96, initializer_range=0.05)
    params = jax.jit(transformer(config).init)(jax.random.key(0))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves(params)}
    assert ("head/kernel" in names) != config.tie_embeddings
    assert ("layers/attn/q/bias" in names) == config.qkv_bias
    assert ("layers/attn/k_norm/scale" in names) == config.qk_norm
    for name, leaf in names.items():
        if name.endswith("scale"):
            assert np.all(leaf == 1), name
        elif name.endswith("bias"):
            assert np.all(leaf == 0), name
        else:
            np.testing.assert_allclose(np.std(leaf), 0.05, rtol=0.1, err_msg=name)
    assert names["layers/attn/q/kernel"].shape == (2, 64, config.num_heads * config.head_dim)
    assert not np.array_equal(*names["layers/mlp/up/kernel"])  # layers differ


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def test_refusals():
    model, params = transformer(LLAMA), random_params(LLAMA)
    tokens, cache = jnp.zeros((2, 5), jnp.int32), model.init_cache(2, 4)
    with pytest.raises(ValueError, match=r"segments have shape \(2, 4\); expected that of tokens, \(2, 5\)"):
        model.hidden(params, tokens, tokens[:, :4])
    with pytest.raises(ValueError, match=r"2 rows and 4 slots cannot take tokens of \(2, 5\)"):
        model.hidden(params, tokens, tokens, cache=cache)
    with pytest.raises(ValueError, match=r"2 rows and 4 slots cannot take tokens of \(1, 4\)"):
        model.hidden(params, tokens[:1, :4], tokens[:1, :4], cache=cache)
    with pytest.raises(ValueError, match="parents and a cache were given"):
        model.hidden(params, tokens[:, :4], tokens[:, :4], parents=tokens[:, :4], cache=cache)


def test_on_a_mesh_it_matches_one_device():
    """Forward, gradient, prefill and decoding on data 2 x model 2, in a process that has four devices."""
    here = pathlib.Path(__file__).parent
    optimised = os.environ["XLA_FLAGS"].replace("level=0", "level=1")  # its bound is tight
    flags = {"XLA_FLAGS": f"{optimised} --xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    script = [sys.executable, str(here / "mesh_script.py")]
    result = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **flags})
    assert result.returncode == 0, result.stderr
    assert "4 devices agree" in result.stdout


@pytest.mark.parametrize("token", [-1, -100, 10_000])
def test_an_id_outside_the_vocabulary_is_loud(token):
    config = TransformerConfig(
        vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4
    )
    model = models.transformer(config)
    params = drawn(model)
    states = model.hidden(params, jnp.array([[1, token], [1, 2]]), jnp.ones((2, 2), jnp.int32)).states
    assert jnp.all(jnp.isnan(states[0, 1])) and jnp.all(jnp.isfinite(states[1]))
