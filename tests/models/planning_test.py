"""The memory planner against XLA's own figures, and against arithmetic; lifetimes of small functions by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from alignax import train
from alignax.algorithms import preference, reward_model, sft
from alignax.models import TransformerConfig, planning, remat, transformer, with_score
from alignax.models.liveness import peak_bytes

SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2)
SHAPE |= dict(head_dim=16, max_positions=1024)


def of(shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def rows(*shape):
    batch = sft.Batch if len(shape) == 2 else preference.Batch
    ids = of(shape)
    return batch(tokens=ids, segments=ids, mask=of(shape, jnp.bool_), weights=of(shape[:1], jnp.float32))


def compiled_bytes(config, make_loss, optimizer, batch, microbatches, reference):
    """What XLA says of the update, its state donated: arguments, outputs that reuse none of them, temporaries."""
    model = transformer(config)
    state = jax.eval_shape(lambda key: train.TrainState.create(model.init(key), optimizer), jax.random.key(0))
    update = jax.jit(train.make_update(make_loss(model), optimizer, microbatches=microbatches), donate_argnums=0)
    frozen = {"reference": state.params} if reference else None
    found = update.lower(state, batch, frozen, {}).compile().memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + outputs + found.temp_size_in_bytes


@pytest.mark.parametrize(
    "change, make_loss, batch, options",
    [
        ({}, sft.make_loss, rows(4, 128), {}),
        ({"num_layers": 4, "remat": remat.dots}, preference.make_loss, rows(8, 2, 256), {"microbatches": 4}),
        ({"hidden_size": 256, "intermediate_size": 512}, sft.make_loss, rows(1, 16), {}),  # the step is the fullest
    ],
    ids=["everything-kept", "dpo-in-parts", "few-tokens"],
)
def test_within_a_tenth_of_what_xla_says(change, make_loss, batch, options):
    config = TransformerConfig(**SHAPE | change)
    pairs, microbatches = isinstance(batch, preference.Batch), options.get("microbatches", 1)
    found = planning.plan(config, make_loss, optax.adam(1e-3), batch, reference=pairs, **options)
    expected = compiled_bytes(config, make_loss, optax.adam(1e-3), batch, microbatches, pairs)
    assert abs(found.total / expected - 1) < 0.1, f"{found}\nXLA: {expected / 2**20:.2f} MiB"


def test_shards_by_arithmetic():
    mesh = AbstractMesh((2, 4), ("data", "tensor"))
    config = TransformerConfig(**SHAPE | {"num_kv_heads": 4})
    options = dict(mesh=mesh, reference=True, critic=config, cache=(6, 100))
    found = planning.plan(config, sft.make_loss, optax.adam(1e-3), rows(8, 32), **options)
    width, inner, vocabulary, layers = 64, 192, 512, 2
    split = 2 * vocabulary * width + layers * (4 * width * width + 3 * width * inner)  # embedding, head, projections
    whole = layers * 2 * width + width  # norms
    assert found.parameters == found.reference == 4 * (split // 4 + whole)
    assert found.optimizer == 2 * found.parameters + 4  # two moments and a counter
    assert found.gradients == found.parameters and found.step == found.gradients + found.optimizer
    with_head = split - vocabulary * width + 4 * whole + 4 * width  # a scalar head instead of the other, not split
    assert found.critic == 3 * 4 * (with_head // 4) + 4
    assert found.batch == 4 * 32 * (4 + 4 + 1) + 4 * 4
    assert found.cache == layers * 3 * 100 * 2 * 1 * 16 * 4  # of its rows and heads: keys and values, float32
    moments = found.gradients + found.activations, found.gradients + found.step, found.cache
    assert found.total == sum(found[:5]) + max(moments)
    # rows over "data" and shares over "tensor" divide what is live; what is not split stays
    alone = planning.plan(config, sft.make_loss, optax.adam(1e-3), rows(8, 32))
    assert alone.activations / 8 < found.activations < alone.activations / 2
    spread = AbstractMesh((2, 2, 2), ("fsdp", "sequence", "tensor"))
    found = planning.plan(config, sft.make_loss, optax.adam(1e-3), rows(8, 32), mesh=spread)
    assert found.parameters == found.gradients == 4 * (split // 4 + whole)
    assert alone.activations / 8 < found.activations < alone.activations / 4
    on_host = planning.plan(
        config, sft.make_loss, optax.adam(1e-3), rows(8, 32), mesh=mesh, host="^opt_state/.*(mu|nu)"
    )
    assert on_host.optimizer == 4 and on_host.parameters == found.parameters  # a share of a quarter, too


def test_what_does_not_fit_is_refused_and_the_largest_named():
    config, batch = TransformerConfig(**SHAPE), reward_model.Batch(of((2, 2, 16)), of((2, 2, 16)))
    build = lambda config: with_score(transformer(config))  # noqa: E731
    found = planning.plan(config, reward_model.make_loss, optax.sgd(1e-3), batch, build=build)
    assert found.reference == found.critic == found.cache == 0
    big = found._replace(activations=3 * 2**30)
    lines = str(big).splitlines()
    assert lines[-1] == "the largest: activations" and "activations     3.00 GiB" in lines
    assert not any(line.startswith("critic") for line in lines)
    assert planning.fits(big, 4 * 2**30) and not planning.fits(big, 3 * 2**30)
    planning.check_fits(big, 4 * 2**30)
    with pytest.raises(
        ValueError, match=r"expected at most 2\.70 GiB, all but 10% of 3\.00 GiB; the largest item is act"
    ):
        planning.check_fits(big, 3 * 2**30)
    with pytest.raises(ValueError, match=r"batch\.tokens has 2 rows, which do not divide into 4 parts"):
        planning.plan(config, reward_model.make_loss, optax.sgd(1e-3), batch, microbatches=4)


X = np.zeros((8, 16), np.float32)  # 512 bytes
W = np.zeros((16, 16), np.float32)  # 1024 bytes


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda x, w: jnp.sin(x) * 2, 512),  # one output, nothing between
        (lambda x, w: jnp.sin(x) @ w, 512 + 512),  # what is multiplied, and the product
        (lambda x, w: ((x @ w) @ w) @ w, 512 + 512),  # two at a time
        (lambda x, w: x.T @ x, 512 + 1024),  # the transposed copy
        (lambda x, w: (jnp.cos(x @ w), x)[1], 0),  # what nobody reads
        (lambda x, w: jax.jit(lambda y: y @ w)(x) + 1, 512 + 512),  # a call is its body
        # products of the loop's body; its carry is the caller's, the stacked results 4 x 512
        (lambda x, w: jax.lax.scan(lambda c, _: (c, jnp.sin(x) @ w), 0.0, None, length=4)[1], 2048 + 512 + 512),
    ],
)
def test_lifetimes_by_hand(function, expected):
    assert peak_bytes(jax.make_jaxpr(function)(X, W).jaxpr) == expected
