"""Attention of whole rows: the kernels in Pallas' interpreter and tiles against a loop in numpy; choices; programs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from references import transformer as reference

from alignax.models import LayerKind, TransformerConfig, attention, flash, kernels, segment_positions, transformer
from alignax.models.rows import Rows

H, KV, D, T = 4, 2, 16, 136  # not a multiple of what the kernels take
SEGMENTS = np.repeat([[1, 2, 3, 0], [1, 0, 0, 0]], [50, 60, 20, 6], axis=1)
PARENTS = np.where(SEGMENTS == 3, 1, 0)
WAYS = {"tiles": flash.tiles(size=16), "splash": flash.splash(interpret=True), "mha": flash.triton(interpret=True)}
ARRAYS = np.random.default_rng(0).normal(size=(4, 2, T, H, D)).astype(np.float32)  # queries, keys, values, cotangent
CASES = [
    ("tiles", True, 30, 1.5),
    ("tiles", False, 30, 1.5),
    ("splash", False, 30, 1.5),
    ("mha", False, None, None),
]


def by_loop(shared, window, softcap):
    """The output [B, T, H, hd] and the gradients of its product with a cotangent, in float64."""
    q, k, v, g = (x.astype(np.float64) for x in ARRAYS)
    out, dq, dk, dv = (np.zeros_like(q) for _ in range(4))
    for b in range(2):
        places, sees = reference.layout(SEGMENTS[b].tolist(), PARENTS[b].tolist() if shared else None)
        for t, h in np.ndindex(T, H):
            seen = [j for j in sorted(sees[t]) if window is None or places[j] > places[t] - window]
            if not seen:
                continue
            raw, head = k[b, seen, h // (H // KV)] @ q[b, t, h] / 3, h // (H // KV)
            scores = raw if softcap is None else softcap * np.tanh(raw / softcap)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[b, t, h] = weights @ v[b, seen, head]
            along = v[b, seen, head] @ g[b, t, h]
            back = weights * (along - weights @ along) / 3
            back = back if softcap is None else back * (1 - (scores / softcap) ** 2)
            dq[b, t, h] = back @ k[b, seen, head]
            dk[b, seen, head] += np.outer(back, q[b, t, h])
            dv[b, seen, head] += np.outer(weights, g[b, t, h])
    return out, dq, dk[:, :, :KV], dv[:, :, :KV]


def described(way, shared, window):
    segments, parents = jnp.asarray(SEGMENTS, jnp.int32), jnp.asarray(PARENTS, jnp.int32)
    if not shared:
        return Rows(way, (window,), segments)
    return Rows(way, (window,), segments, parents, jax.jit(segment_positions)(segments, parents))


@pytest.mark.parametrize("name, shared, window, softcap", CASES)
def test_values_and_gradients_by_a_loop(name, shared, window, softcap):
    queries, keys, values, cotangent = ARRAYS
    rows, real = described(WAYS[name].attend, shared, window), (SEGMENTS != 0)[:, :, None, None]

    def value(queries, keys, values):
        mixed = rows.attend(queries, attention.as_cache(keys, values), scalar=9.0, softcap=softcap)
        mixed = jnp.where(real, mixed, 0.0)
        return jnp.sum(mixed * cotangent), mixed

    arrays = (queries, keys[:, :, :KV], values[:, :, :KV])
    found, mixed = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)
    expected = by_loop(shared, window, softcap)
    np.testing.assert_allclose(mixed, expected[0], atol=2e-6)
    for got, want in zip(found, expected[1:]):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.max(np.abs(want)))


CONFIG = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    pattern=(LayerKind(window=4), LayerKind(rope_theta=50.0), LayerKind()),  # two windows, three kinds
    initializer_range=0.4,
    attention_softcap=3.0,
    mixture=True,
    num_experts=2,
    attention=flash.plain(),
)
ROW = np.array([[1] * 9 + [2] * 7 + [3] * 6 + [0] * 2])


@functools.cache
def parameters():
    rng, shapes = np.random.default_rng(1), jax.eval_shape(transformer(CONFIG).init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.4, leaf.shape), jnp.float32), shapes)


@functools.cache
def states(way, shared=False, prefill=False):
    """Of every token that is not padding, and the cache that a prefill leaves behind."""
    model = transformer(dataclasses.replace(CONFIG, attention=way))
    segments = (ROW if not prefill else ROW != 0).astype(np.int32)
    parents = np.where(segments == 3, 1, 0) if shared else None

    @jax.jit
    def run(params, segments, parents):
        cache = model.init_cache(1, 30) if prefill else None
        params = model.unroll(params) if prefill == "unrolled" else params
        found = model.hidden(params, segments * 3 + jnp.arange(24)[None] % 7, segments, parents=parents, cache=cache)
        return jnp.where(segments[..., None] != 0, found.states, 0.0), found.cache, found.aux

    found, cache, aux = run(parameters(), segments, parents)
    return found, [np.asarray(layer.values)[:, :, :22] for layer in cache or ()], aux


@pytest.mark.parametrize(
    "way, shared, prefill",
    [
        (flash.tiles(size=5), True, False),
        (flash.splash(interpret=True), False, False),
        (flash.tiles(size=5), False, "unrolled"),
    ],
)
def test_a_model_of_several_kinds_of_layer(way, shared, prefill):
    expected, found = states(flash.plain(), shared, prefill), states(way, shared, prefill)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.max(np.abs(want)))


LONG = dataclasses.replace(CONFIG, attention=None, attention_softcap=None, mixture=False, head_dim=64, dtype="bfloat16")
GLOBAL = dataclasses.replace(LONG, pattern=(LayerKind(),))


def gradient(config, length, segments_dtype=jnp.int32):
    """The gradient of a training step, traced for rows of a length."""
    model = transformer(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens, segments = (jax.ShapeDtypeStruct((2, length), dtype) for dtype in (jnp.int32, segments_dtype))
    grad = jax.grad(lambda params, *row: jnp.sum(model.hidden(params, *row).states.astype(jnp.float32)))
    return jax.jit(grad).trace(params, tokens, segments)


def test_no_square_is_made():
    """640 tokens, so that no other axis is as long: a mask of [T, T] is in the plain program and in no other."""
    square = "[640,640]", ",640,640]"
    ways = [(flash.plain(), True), (flash.tiles(), False), (flash.splash(), False), (flash.triton(), False)]
    for way, made in ways:
        config = dataclasses.replace(GLOBAL if way == flash.triton() else LONG, attention=way)
        assert any(shape in str(gradient(config, 640).jaxpr) for shape in square) == made, way


def test_splash_lowers_for_tpu():
    """Two windows, a forward, a key and a query kernel each; a layer of the scan picks its own."""
    program = gradient(dataclasses.replace(LONG, attention=flash.splash()), 256).lower(lowering_platforms=("tpu",))
    assert program.as_text().count("custom_call @tpu_custom_call(") == 6


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11.2 on
def test_triton_lowers_for_cuda():
    """A forward, a preparing and a backward kernel, in one scan."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = gradient(dataclasses.replace(GLOBAL, attention=flash.triton()), 256)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @__gpu$xla.gpu.triton(") == 3


def test_cudnn_lowers_for_cuda(monkeypatch):
    """What JAX asks the library for, its version, is answered here."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(private, "check_cudnn_version", lambda: 91_200)
    traced = gradient(dataclasses.replace(LONG, attention=flash.cudnn()), 256, segments_dtype=jnp.bool_)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("__cudnn$fmhaSoftmaxBackward") and "sliding_window_length" in program


@pytest.mark.parametrize(
    "change, platform, facts, name, reason",
    [
        ({}, "cpu", {"length": 512}, "plain XLA", "a row of 512 tokens is short"),
        ({}, "cpu", {"length": 4096}, "tiled XLA", "for TPUs and GPUs"),
        ({}, None, {"length": 4096}, "tiled XLA", "for TPUs and GPUs"),
        ({"attention_softcap": 9.0}, "tpu", {}, "splash", "in the kernel"),
        ({}, "tpu", {"shared": True}, "tiled XLA", "know no parents"),
        ({}, "tpu", {"placed": True}, "tiled XLA", "positions are given"),
        ({"pattern": (LayerKind(),)}, "tpu", {"placed": True}, "splash", "in the kernel"),
        ({}, "tpu", {"length": 100}, "plain XLA", "is short"),
        ({}, "cuda", {"packed": False}, "cuDNN", "one segment"),
        ({}, "cuda", {}, "tiled XLA", "packed rows has no windows"),
        ({"pattern": (LayerKind(),)}, "cuda", {}, "Pallas mha", "packed rows"),
        ({"pattern": (LayerKind(),), "head_dim": 96}, "cuda", {}, "tiled XLA", "head_dim=96"),
        ({"attention_softcap": 9.0}, "cuda", {"packed": False}, "tiled XLA", "attention_softcap=9.0"),
        ({"dtype": "float32"}, "cuda", {"packed": False}, "tiled XLA", "dtype=float32"),
        ({}, "rocm", {}, "tiled XLA", "no kernel is known for rocm"),
        ({"attention": flash.splash()}, "cpu", {"length": 3}, "splash", "in the kernel"),
    ],
)
def test_choices(change, platform, facts, name, reason):
    choice = flash.choose(dataclasses.replace(LONG, **change), platform, **facts)
    assert choice.name == name and reason in choice.reason
    assert str(choice).startswith(f"attention of rows: {name}: ") and "\n" not in str(choice)


@pytest.mark.parametrize(
    "axes, types_, name, reason",
    [
        ({"data": 2, "tensor": 2}, AxisType.Auto, "splash", "in the kernel"),
        ({"data": 4}, AxisType.Auto, "tiled XLA", "2 rows and 4 heads (2 of keys) do not divide among 4 x 1 devices"),
        ({"tensor": 2, "sequence": 2}, AxisType.Auto, "splash", "in the kernel"),  # keys are repeated
        ({"tensor": 8}, AxisType.Auto, "tiled XLA", "do not divide among 1 x 8 devices"),
        ({"device": 8}, AxisType.Manual, "splash", "in the kernel"),  # inside of `jax.shard_map` or `jax.pmap`
    ],
)
def test_choices_on_a_mesh(axes, types_, name, reason):
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(types_,) * len(axes))
    with jax.sharding.use_abstract_mesh(mesh):
        choice = flash.choose(LONG, "tpu", rows=2)
    assert choice.name == name and reason in choice.reason


def test_several_devices_without_a_mesh(monkeypatch):
    monkeypatch.setattr(kernels, "default_platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert "no mesh is set that says how to split a kernel over 8 devices" in str(flash.choose(LONG))


def test_what_a_gpu_lacks_is_the_reason(monkeypatch):
    def gone():
        raise ModuleNotFoundError("No module named 'attention'")

    monkeypatch.setattr(kernels, "default_platform", lambda: "cuda")
    monkeypatch.setattr(flash, "_triton", gone)
    assert "cannot be imported (ModuleNotFoundError: No module named" in str(flash.choose(GLOBAL))
    assert "cuDNN refuses (RuntimeError: cuDNN is not detected" in str(flash.choose(GLOBAL, packed=False))


@pytest.mark.parametrize("name, window, softcap", [("splash", 4, None), ("mha", 4, None), ("mha", None, 2.0)])
def test_what_a_kernel_does_not_take_is_refused(name, window, softcap):
    rows = described(WAYS[name].attend, shared=False, window=window)
    rows = dataclasses.replace(rows, positions=rows.segments if name == "splash" else None)
    queries, keys, values, _ = (jnp.asarray(x) for x in ARRAYS)
    with pytest.raises(ValueError, match=f"window of 4|window={window}, softcap={softcap}"):
        rows.attend(queries, attention.as_cache(keys, values), softcap=softcap)
    with pytest.raises(ValueError, match="parents"):
        dataclasses.replace(rows, parents=rows.segments).attend(queries, attention.as_cache(keys, values))
