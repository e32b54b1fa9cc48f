"""Sampling in bfloat16 beside float32 masters: the cast, what it costs, and where its leaves live."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn

from alignax.models import TransformerConfig, transformer
from alignax.sampling import generate, parity_report, rollout_params

CONFIG = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=32,
    initializer_range=0.4,
)


@functools.cache
def compiled(config):
    """A model, its sampler, and the report of the float32 trainer on what it samples."""
    model = transformer(config)
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=16, group=4))
    prompts, lengths = jax.random.randint(jax.random.key(2), (3, 5), 0, 32), jnp.array([5, 2, 3])
    return model, lambda params: sample(params, prompts, lengths, jax.random.key(3), temperature=0.9)


@functools.cache
def masters():
    return drawn(compiled(CONFIG)[0], scale=0.4)


def bits(tree):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_cast_weights_sample_what_stored_ones_do_and_the_masters_stay():
    model, sample = compiled(dataclasses.replace(CONFIG, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16))
    before = bits(masters())
    cast = jax.jit(rollout_params)(masters())
    stored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(jnp.bfloat16)), masters())
    shapes = jax.eval_shape(model.init, jax.random.key(1))  # as a model of bfloat16 parameters creates them
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cast) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert bits(cast) == bits(stored)
    jax.tree.map(np.testing.assert_array_equal, sample(cast), sample(stored))
    assert bits(masters()) == before and {dtype for dtype, _ in before} == {jnp.dtype("float32")}


def test_what_bfloat16_costs_is_the_size_of_its_rounding():
    report = jax.jit(functools.partial(parity_report, compiled(CONFIG)[0]))
    rounded = compiled(dataclasses.replace(CONFIG, dtype=jnp.bfloat16))[1](rollout_params(masters()))
    assert rounded.logp.dtype == jnp.float32
    exact = report(masters(), compiled(CONFIG)[1](masters()), temperature=0.9)
    coarse = report(masters(), rounded, temperature=0.9)
    assert exact.tokens == coarse.tokens == 3 * 4 * 16
    assert exact.max < 1e-5 and exact.k3 < 1e-10 and exact.outside == 0
    # roundings of 2^-9 of numbers about 1, ten thousand times those of float32 and more
    assert 2**-9 < coarse.max < 0.5 and 2**-9 < coarse.mean < 0.05 and 1e-5 < coarse.k3 < 1e-2
    assert coarse.outside > 0.1 and coarse.mean > 1e4 * exact.mean


def test_only_floating_leaves_are_cast():
    tree = {
        "kernel": jnp.ones((2, 2)),
        "half": jnp.ones(2, jnp.float16),
        "quantised": jnp.ones(2, jnp.int8),
        "flag": jnp.array([True]),
        "key": jax.random.key(0),
        "nothing": None,
        "host": np.ones(2, np.float32),
    }
    cast = rollout_params(tree, jnp.float16)
    assert cast["kernel"].dtype == cast["half"].dtype == cast["host"].dtype == jnp.float16
    assert cast["quantised"] is tree["quantised"] and cast["flag"] is tree["flag"] and cast["key"] is tree["key"]
    assert cast["nothing"] is None
    with pytest.raises(ValueError, match="rollout_params: dtype=int8; expected a floating-point dtype"):
        rollout_params(tree, jnp.int8)


_ON_A_MESH = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from alignax import sampling, sharding
mesh = sharding.make_mesh(data=2, tensor=2)
specs = {"column": P(None, "tensor"), "row": P("tensor", None), "all": P()}
params = {n: jax.device_put(np.ones((4, 4), np.float32), NamedSharding(mesh, s)) for n, s in specs.items()}
for cast in (jax.jit(sampling.rollout_params), sampling.rollout_params):
    for name, leaf in cast(params).items():
        assert leaf.sharding.is_equivalent_to(params[name].sharding, 2), (name, leaf.sharding)
        assert leaf.dtype == "bfloat16"
print("kept")
"""


def test_shardings_are_kept():
    """In a process that has four devices."""
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", _ON_A_MESH], capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0 and "kept" in done.stdout, done.stderr
