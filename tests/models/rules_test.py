"""Every parameter of every family has a rule, and what is large is split over every axis that may split it."""

import math
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh

from alignax import models, sharding, train
from alignax.io import hf
from alignax.models import lora

FAMILIES = sorted(path.parent for path in (pathlib.Path(__file__).parents[1] / "vectors" / "hf").glob("*/config.json"))
MESH = AbstractMesh((2, 2, 2), ("fsdp", "expert", "tensor"))
SMALL = ("scale", "bias", "lora_a", "lora_b", "lora_magnitude")


def specs(tree, mesh=MESH):
    found = sharding.shardings(tree, mesh, models.RULES)
    return {sharding.path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def axes_of(spec):
    return {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda path: path.name)
def test_every_parameter_and_every_moment_has_its_rule(folder):
    model = hf.load(folder).model
    params = jax.eval_shape(model.init, jax.random.key(0))
    mesh = AbstractMesh((2, model.config.num_experts or 1, 2), ("fsdp", "expert", "tensor"))
    found = specs(params, mesh)
    for name, spec in found.items():
        small = name.endswith(SMALL) or "positions" in name or "router" in name or "score" in name
        wanted = {"fsdp", "tensor", "expert"} if "/experts/" in name else {"fsdp", "tensor"}
        assert small or axes_of(spec) == wanted, (name, spec)
    state = jax.eval_shape(lambda p: train.TrainState.create(p, optax.adamw(1e-3)), params)
    moments = specs(state, mesh)
    for name, spec in found.items():
        assert moments[f"opt_state/0/mu/{name}"] == moments[f"opt_state/0/nu/{name}"] == spec
    adapters = (
        jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, models.LoraConfig(rank=2, alpha=2.0)), params)
        if not model.config.mixture
        else {}
    )
    assert all(axes_of(spec) <= {"fsdp", "tensor"} for spec in specs(adapters, mesh).values())


def test_a_vocabulary_that_does_not_divide_leaves_it_to_the_other_axis():
    config = models.TransformerConfig(
        vocab_size=33, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4
    )
    params = jax.eval_shape(models.transformer(config).init, jax.random.key(0))
    found = specs(params)
    both = ("fsdp", "tensor")
    assert found["embed/embedding"] == jax.P(None, both) and found["head/kernel"] == jax.P(both, None)


def test_bytes_of_a_device_fall_with_the_devices():
    config = models.TransformerConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8
    )
    params = jax.eval_shape(models.transformer(config).init, jax.random.key(0))

    def held(**axes):
        where = sharding.shardings(params, AbstractMesh(tuple(axes.values()), tuple(axes)), models.RULES)
        shards = jax.tree.map(lambda place, leaf: math.prod(place.shard_shape(leaf.shape)), where, params)
        norms = 5 * config.hidden_size  # on every device: two of each layer and the last
        return sum(jax.tree.leaves(shards)) - norms

    whole = held(data=8)
    for axes in (
        {"fsdp": 8},
        {"tensor": 8},
        {"fsdp": 2, "tensor": 4},
        {"data": 2, "fsdp": 4},
        {"sequence": 2, "fsdp": 4},
    ):
        assert held(**axes) * axes.get("fsdp", 1) * axes.get("tensor", 1) == whole


def test_a_leaf_without_a_rule_is_refused_by_name():
    with pytest.raises(ValueError, match="no rule matches 'layers/attn/extra/kernel'"):
        specs({"layers": {"attn": {"extra": {"kernel": jnp.zeros((2, 4, 4))}}}})
