"""Placement on the one device that is here; tests/distributed_test.py runs it on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from problems import tiny

from alignax import models, sharding, train

RULES = ((r"kernel$", PartitionSpec(None, "tensor")), (r"bias$", PartitionSpec("tensor")), (r".*", PartitionSpec()))


def abstract(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes))


def specs(tree, mesh, rules=RULES):
    return jax.tree.map(lambda x: x.spec, sharding.shardings(tree, mesh, rules))


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def test_the_first_rule_that_matches_decides():
    found = specs({"layer": shapes(kernel=(4, 6), bias=(6,), scale=(4,))}, abstract(data=2, tensor=3))
    assert found["layer"] == {
        "kernel": PartitionSpec(None, "tensor"),
        "bias": PartitionSpec("tensor"),
        "scale": PartitionSpec(),
    }


def test_optimizer_state_follows_its_parameters():
    _, params = tiny()
    mesh = abstract(data=2, tensor=2)
    state = jax.eval_shape(lambda p: train.TrainState.create(p, optax.adamw(1e-3)), params)
    found = specs(state, mesh, models.RULES)
    assert found.params == specs(params, mesh, models.RULES)
    assert found.opt_state[0].mu == found.params and found.opt_state[0].nu == found.params
    assert found.step == PartitionSpec() and found.opt_state[0].count == PartitionSpec()


def test_axes_the_mesh_lacks_are_left_out():
    assert specs(shapes(kernel=(4, 6)), abstract(data=2)) == {"kernel": PartitionSpec(None, None)}


def test_errors_name_the_leaf():
    with pytest.raises(ValueError, match=r"'a/kernel' of shape \(4, 5\) does not divide by \{'tensor': 3\} as"):
        specs({"a": shapes(kernel=(4, 5))}, abstract(tensor=3))
    with pytest.raises(ValueError, match=r"no rule matches 'scale'; rules: \['kernel\$'\]"):
        specs(shapes(scale=(4,)), abstract(tensor=2), RULES[:1])


def test_make_mesh():
    mesh = sharding.make_mesh(data=-1, tensor=1)
    assert dict(mesh.shape) == {"data": len(jax.devices()), "tensor": 1}
    with pytest.raises(ValueError, match="do not multiply to"):
        sharding.make_mesh(data=3, tensor=5)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch\['x'\] has 5 rows for 2 devices"):
        sharding.split_rows({"x": np.zeros(5)}, 2)
    np.testing.assert_array_equal(sharding.split_rows(np.arange(6), 2), [[0, 1, 2], [3, 4, 5]])


def test_replicate_and_back():
    tree = {"a": jnp.arange(3), "key": jax.random.key(1)}
    copies = sharding.replicate(tree)
    assert copies["a"].shape == (len(jax.local_devices()), 3)
    np.testing.assert_array_equal(sharding.unreplicate(copies)["a"], tree["a"])
    assert sharding.unreplicate(copies)["key"] == tree["key"]


def test_activations_are_split_as_far_as_they_divide():
    def spec(shape, *axes, **sizes):
        kinds = (AxisType.Auto,) * len(sizes)
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)
        with jax.sharding.use_abstract_mesh(mesh):
            jaxpr = jax.make_jaxpr(lambda x: sharding.constrain(x, *axes))(jnp.zeros(shape))
        return [tuple(equation.params["sharding"].spec) for equation in jaxpr.eqns]

    rows = ("data", "fsdp")
    assert spec((8, 6), rows, "tensor", data=2, fsdp=4, tensor=3) == [(rows, "tensor")]
    assert spec((6, 7), rows, "tensor", data=2, fsdp=4, tensor=3) == [("data", None)]  # 6 do not divide by 8, 7 by 3
    assert spec((8, 6), rows, None, fsdp=4, tensor=1) == [("fsdp", None)]
    assert spec((8, 6), rows, "tensor", data=1, other=1) == [] == spec((8, 6), rows, None)
