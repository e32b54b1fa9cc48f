"""The kernel for one new token in Pallas' interpreter, against loops in numpy and the forward pass of whole rows."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn

from alignax.models import LayerKind, TransformerConfig, attention, kernels, transformer
from alignax.sampling import generate

KERNEL = kernels.pallas(interpret=True)
CONFIG = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    pattern=(LayerKind(), LayerKind(window=3)),
    initializer_range=0.4,
    decode_attention=KERNEL,
)
PLAIN = dataclasses.replace(CONFIG, decode_attention=kernels.plain())
KV, G, D, SLOTS = 2, 3, 16, 128  # of a cache: two pieces, which two programs of the kernel read
LENGTHS = np.array([0, 5, 127])  # filled slots of a prompt: that of one token has none
FILLED = np.array([[1, 70, 128], [3, 66, 64], [2, 1, 100]])  # own slots of the rows of each prompt


def cached(rng, rows):
    """A random cache, as numpy sees it and as the kernel does. Unfilled slots hold numbers as good as any."""
    keys, values = rng.normal(size=(2, rows, KV, SLOTS, D)).astype(np.float32)
    return (keys, values), attention.SlotMajorCache(jnp.asarray(keys), jnp.asarray(values))


def expected(query, parts, scalar):
    """One row's query heads [H, hd] over the slots [n, hd] that each key head has in several caches."""
    mixed = np.zeros((KV * G, D))
    for head in range(KV * G):
        keys, values = (np.concatenate([part[i][head // G] for part in parts]).astype(np.float64) for i in (0, 1))
        weights = np.exp(keys @ query[head] / np.sqrt(scalar))
        mixed[head] = weights @ values / weights.sum()
    return mixed


@functools.cache
def compiled(scalar):
    return jax.jit(functools.partial(kernels.attend_spans, scalar=scalar, interpret=True))


@pytest.mark.parametrize("group, window, scalar", [(1, None, None), (3, None, 9.0), (1, 4, None), (3, 66, None)])
def test_forked_attention_row_by_row(group, window, scalar):
    rng = np.random.default_rng(group)
    rows, filled = 3 * group, FILLED[:, :group].reshape(-1)
    queries = rng.normal(size=(rows, 1, KV * G, D)).astype(np.float32)
    shared, shared_cache = cached(rng, 3)
    own, own_cache = cached(rng, rows)
    positions = np.repeat(LENGTHS, group) + filled - 1
    config = dataclasses.replace(CONFIG, pattern=(LayerKind(window=window),))
    (spans,) = kernels.spans(config, jnp.asarray(positions), jnp.asarray(LENGTHS))
    cache = attention.ForkedCache(shared_cache, own_cache)
    found = np.asarray(compiled(scalar)(queries, cache, spans))
    for row in range(rows):
        prompt, length = row // group, LENGTHS[row // group]
        first = 0 if window is None else max(positions[row] - window + 1, 0)
        parts = (
            tuple(x[prompt][:, first:length] for x in shared),
            tuple(x[row][:, max(first - length, 0) : filled[row]] for x in own),
        )
        np.testing.assert_allclose(found[row, 0], expected(queries[row, 0], parts, scalar or D), atol=1e-5)


def test_whole_rows_without_a_shared_part():
    rng = np.random.default_rng(4)
    queries = rng.normal(size=(3, 1, KV * G, D)).astype(np.float32)
    own, cache = cached(rng, 3)
    positions = np.array([0, 64, 127])
    config = dataclasses.replace(CONFIG, pattern=(LayerKind(), LayerKind(window=2)))
    for spans, window in zip(kernels.spans(config, jnp.asarray(positions), None), (1000, 2)):
        found = np.asarray(compiled(None)(queries, cache, spans))
        for row, at in enumerate(positions):
            seen = tuple(x[row][:, max(at - window + 1, 0) : at + 1] for x in own)
            np.testing.assert_allclose(found[row, 0], expected(queries[row, 0], [seen], D), atol=1e-5)


def test_a_row_that_sees_nothing_is_finite():
    """A row that is done may point behind its slots."""
    _, cache = cached(np.random.default_rng(5), 3)
    spans = kernels.Spans(np.full(3, 300), np.full(3, 301))
    assert np.all(np.asarray(compiled(None)(np.ones((3, 1, KV * G, D), np.float32), cache, spans)) == 0)


@functools.cache
def forward():
    model = transformer(PLAIN)
    params = drawn(model, 0.4)
    return params, jax.jit(lambda *row: model.logits(params, model.hidden(params, *row).states))


@pytest.mark.parametrize("group", [1, 3])
def test_greedy_generation_is_what_the_forward_pass_prefers(group):
    """Ragged prompts, one of a single token, in layers with a window and without."""
    params, logits_of = forward()
    sample = jax.jit(functools.partial(generate, transformer(CONFIG), max_new_tokens=7, group=group))
    prompts, lengths = np.array([[1, 2, 3, 4, 5], [6, 1, 0, 0, 0], [3, 0, 0, 0, 0]]), np.array([5, 2, 1])
    samples = jax.device_get(sample(params, prompts, lengths, jax.random.key(0), temperature=0.0))
    logits = np.asarray(logits_of(samples.tokens, samples.segments), np.float64)
    logp = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    for row, column in np.argwhere(samples.mask):
        token = int(samples.tokens[row, column])
        assert token == np.argmax(logp[row, column - 1])
        np.testing.assert_allclose(samples.logp[row, column], logp[row, column - 1, token], atol=1e-5)
    assert np.all(np.sum(samples.mask, axis=1) == 7)


def test_several_tokens_at_a_time_read_the_same_cache():
    """A prefill at explicit positions and two more tokens at once: the plain way over keys stored for the kernel."""
    params, logits_of = forward()
    model = transformer(CONFIG)
    tokens = np.random.default_rng(6).integers(0, 32, (2, 6)).astype(np.int32)
    cache, found = jax.jit(lambda: model.init_cache(2, 6))(), []
    assert {leaf.shape for leaf in jax.tree.leaves(cache)} == {(2, 2, 64, 16)}  # a whole piece

    @jax.jit
    def step(params, tokens, positions, cache):
        hidden = model.hidden(params, tokens, jnp.ones_like(tokens), positions=positions, cache=cache)
        return hidden.cache, model.logits(params, hidden.states)

    for start, stop in ((0, 2), (2, 4), (4, 6)):
        positions = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, 2))
        cache, logits = step(params, tokens[:, start:stop], positions, cache)
        found.append(logits)
    assert all(isinstance(layer, attention.SlotMajorCache) for layer in cache)
    np.testing.assert_allclose(np.concatenate(found, axis=1), logits_of(tokens, np.ones_like(tokens)), atol=1e-5)


AUTOMATIC = dataclasses.replace(CONFIG, decode_attention=None)


@pytest.mark.parametrize(
    "change, platform, name, reason",
    [
        ({}, "cuda", "Pallas mqa", "filled slots only"),
        ({"head_dim": 256, "dtype": "bfloat16"}, "cuda", "Pallas mqa", "filled slots only"),
        ({}, "cpu", "plain XLA", "for GPUs"),
        ({}, None, "plain XLA", "for GPUs"),
        ({}, "tpu", "plain XLA", "return no sums"),
        ({}, "rocm", "plain XLA", "no kernel is known for rocm"),
        ({"attention_softcap": 30.0}, "cuda", "plain XLA", "caps no scores, attention_softcap=30.0"),
        ({"head_dim": 96}, "cuda", "plain XLA", "head_dim=96"),
        ({"head_dim": 8}, "cuda", "plain XLA", "head_dim=8"),
        ({"decode_attention": KERNEL}, "tpu", "Pallas mqa", "interpreted"),
        ({"decode_attention": kernels.plain()}, "cuda", "plain XLA", "asked for"),
    ],
)
def test_choices(change, platform, name, reason):
    choice = kernels.choose(dataclasses.replace(AUTOMATIC, **change), platform)
    assert choice.name == name and reason in choice.reason
    assert (choice.attend is not None) == choice.slot_major == (name == "Pallas mqa")
    assert str(choice).startswith(f"decode attention: {name}, keys [B, KV, ") and "\n" not in str(choice)


def test_a_kernel_that_cannot_be_imported_is_not_chosen(monkeypatch):
    def gone():
        raise ModuleNotFoundError("No module named 'decode_attention'")

    monkeypatch.setattr(kernels, "_mqa", gone)
    choice = kernels.choose(AUTOMATIC, "cuda")
    assert choice.attend is None and "cannot be imported (ModuleNotFoundError: No module named" in choice.reason


def test_configurations_that_choose_alike_are_equal():
    again = dataclasses.replace(AUTOMATIC, decode_attention=kernels.pallas(interpret=True))
    assert again == CONFIG and hash(again) == hash(CONFIG) and CONFIG != AUTOMATIC


@pytest.mark.parametrize("softcap, queries, kind", [(5.0, 1, "Slot"), (None, 2, "Slot"), (None, 1, "Plain")])
def test_what_the_kernel_does_not_take_is_refused(softcap, queries, kind):
    arrays = jnp.ones((1, KV, SLOTS, D)), jnp.ones((1, KV, SLOTS, D))
    cache = (attention.SlotMajorCache if kind == "Slot" else attention.LayerCache)(*arrays)
    spans = kernels.Spans(None, jnp.ones(1, jnp.int32))
    with pytest.raises(ValueError, match="expected no soft-cap, one query and a SlotMajorCache"):
        kernels.attend_spans(jnp.ones((1, queries, KV * G, D)), cache, spans, softcap=softcap, interpret=True)


def test_blocks_by_hand():
    """64 rows x 8 key heads of 64 bfloat16 channels fill the device as they are; one prompt x 8 needs all 8 parts."""
    assert kernels._blocks(512, 4, 512, 64, 2) == {"block_h": 16, "block_k": 64, "k_splits": 1}
    assert kernels._blocks(8, 32, 512, 64, 2) == {"block_h": 32, "block_k": 64, "k_splits": 8}
    assert kernels._blocks(128, 4, 384, 256, 4) == {"block_h": 16, "block_k": 16, "k_splits": 6}
    assert kernels._blocks(128, 300, 384, 256, 2) == {"block_h": 32, "block_k": 32, "k_splits": 1}


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # jax 0.11.2 on
def test_a_step_lowers_for_cuda():
    """Without a GPU: what Triton is given is built, not compiled. One program for own slots,
    which both layers call, and two for shared slots, with a window and without."""
    model = transformer(dataclasses.replace(CONFIG, dtype="bfloat16", decode_attention=kernels.pallas()))
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")

    def step(params, tokens, positions, lengths):
        cache = model.fork(model.init_cache(2, 100), lengths, 3, 40)
        return model.hidden(params, tokens, jnp.ones_like(tokens), positions=positions, cache=cache).states

    column, lengths = jax.ShapeDtypeStruct((6, 1), jnp.int32), jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(step).trace(params, column, column, lengths)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @__gpu$xla.gpu.triton(") == 3


@pytest.mark.parametrize(
    "capability, version, devices, name, reason",
    [
        ("9.0", "PJRT C API\ncuda 13000", 1, "Pallas mqa", "filled slots only"),
        ("12.0", "PJRT C API\ncuda 13000", 1, "Pallas mqa", "filled slots only"),
        ("7.5", "PJRT C API\ncuda 13000", 1, "plain XLA", "a GPU is older than what Triton compiles for"),
        ("9.0", "PJRT C API\ncuda 13000", 8, "plain XLA", "does not split a kernel over the 8 devices"),
        ("gfx942", "PJRT C API\nrocm 60300", 1, "plain XLA", "no kernel is known for rocm"),
    ],
)
def test_the_device_at_hand_is_asked(monkeypatch, capability, version, devices, name, reason):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(device_kind="a GPU", client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device] * devices)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    choice = kernels.choose(AUTOMATIC)
    assert choice.name == name and reason in choice.reason
