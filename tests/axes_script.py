"""Run by axes_test.py in a process with eight simulated devices: each axis of a mesh against one device."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parameters import drawn

from alignax import logprobs, sampling, sharding, train
from alignax.algorithms import sft
from alignax.models import RULES, TransformerConfig, transformer

DENSE = TransformerConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4,
    initializer_range=0.3,
)  # fmt: skip
MIXTURE = dataclasses.replace(DENSE, mixture=True, num_experts=4)
ODD = dataclasses.replace(DENSE, vocab_size=33)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 32, (8, 24)).astype(np.int32)
SEGMENTS = (np.arange(24)[None] < RNG.integers(12, 25, (8, 1))).astype(np.int32)
MASK = (SEGMENTS != 0) & (np.arange(24) > 5)[None]


def gradient(model):
    def measured(params, tokens, segments, mask):
        found = logprobs.score(model, params, tokens, segments, mask=mask, want=("entropy",))
        return jnp.sum(jnp.sin(found.logp)) + 0.1 * jnp.sum(found.entropy)

    return jax.value_and_grad(measured)


def kinds(text):
    names = ("all-gather", "all-to-all", "reduce-scatter")
    return {name: len(re.findall(rf"= [^=]*? {name}(?:-start)?\(", text)) for name in names}


def check_update(config, **axes):
    """Loss and gradient of a network on a mesh; gives the compiled program's text."""
    model, mesh = transformer(config), sharding.make_mesh(**axes)
    params = drawn(model)
    expected = jax.jit(gradient(model))(params, TOKENS, SEGMENTS, MASK)
    where = sharding.shardings(params, mesh, RULES)
    args = jax.device_put(params, where), *sharding.shard_batch((TOKENS, SEGMENTS, MASK), mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(gradient(model), out_shardings=(None, where)).lower(*args).compile()
        found = compiled(*args)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for got, wanted in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))
    return compiled.as_text() or ""


def check_decoding():
    """Weights that lie over fsdp are gathered before the loop over tokens, and none in it."""
    model, mesh = transformer(DENSE), sharding.make_mesh(fsdp=4, tensor=2)
    params, options = drawn(model), {"max_new_tokens": 6, "temperature": 0.0}
    asked = TOKENS[:, :5], np.full(8, 5, np.int32)

    def generate(params, *rows):
        params = sharding.gathered(params, RULES)
        return sampling.generate(model, params, *rows, jax.random.key(1), **options)

    expected = jax.jit(generate)(params, *asked)
    args = jax.device_put(params, sharding.shardings(params, mesh, RULES)), *sharding.shard_batch(asked, mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(generate).lower(*args).compile()
        found = compiled(*args)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logp, expected.logp, rtol=0, atol=1e-5)
    inner, entry = (compiled.as_text() or "").split("\nENTRY ")
    gathered = [re.findall(r"= f32(\S+) all-gather", part) for part in (inner, entry)]
    assert any("16,12" in shape for shape in gathered[1])
    assert not any(re.search(r"16,|,16\]", shape) for shape in gathered[0]), gathered[0]


def check_places():
    """After an update every leaf of the state lies where it lay before."""
    model, mesh, optimizer = transformer(DENSE), sharding.make_mesh(fsdp=2, sequence=2, tensor=2), optax.sgd(0.1)
    create = sharding.born_sharded(lambda key: train.TrainState.create(model.init(key), optimizer), mesh, RULES)
    state, batch = create(jax.random.key(0)), sharding.shard_batch(sft.Batch(TOKENS, SEGMENTS, MASK), mesh)
    before = jax.tree.map(lambda x: x.sharding, state)
    with jax.set_mesh(mesh):
        state, _ = sharding.in_place(train.make_update(sft.make_loss(model), optimizer))(state, batch)
    moved = jax.tree.map(lambda x, place: not x.sharding.is_equivalent_to(place, x.ndim), state, before)
    assert not any(jax.tree.leaves(moved)), moved


if __name__ == "__main__":
    check_places()
    text = check_update(DENSE, fsdp=2, sequence=2, tensor=2)
    assert kinds(text)["all-to-all"] > 0  # tokens for heads
    check_update(ODD, data=2, fsdp=2, tensor=2)  # a vocabulary that no axis divides
    found = kinds(check_update(MIXTURE, data=2, expert=4))
    assert found["reduce-scatter"] > 0 and found["all-gather"] > 0  # tokens to experts and back
    check_update(MIXTURE, fsdp=2, expert=2, sequence=2)
    check_decoding()
