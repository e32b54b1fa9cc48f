"""Run by checkpoint_test.py in a process with eight simulated devices: one checkpoint, restored on other meshes."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignax import precision, train
from alignax.io import checkpoint

SPECS = {"kernel": P("rows", "columns"), "bias": P("columns"), "ids": P("rows"), "moments": P(None, "rows")}
TREE = {
    "kernel": np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32),
    "bias": np.arange(8).astype(jnp.bfloat16),
    "ids": np.arange(-4, 4, dtype=np.int8),
    "moments": np.full((4, 8), 200, np.uint8),
}


def place(rows, columns, scale=1):
    """The tree on a mesh, its moments in the host's memory; a row of keys, too."""
    mesh = jax.make_mesh((rows, columns), ("rows", "columns"), devices=jax.devices()[: rows * columns])
    kinds = {"moments": "pinned_host"}
    where = {name: NamedSharding(mesh, spec, memory_kind=kinds.get(name, "device")) for name, spec in SPECS.items()}
    keys = jax.device_put(jax.random.split(jax.random.key(scale), 8), NamedSharding(mesh, P("rows")))
    arrays = {name: jax.device_put((scale * value).astype(value.dtype), where[name]) for name, value in TREE.items()}
    return {"arrays": arrays, "keys": keys}


def check_meshes(manager):
    """The bits, dtypes, shardings and memory of the example, whatever the mesh was that saved."""
    saved = place(4, 2)
    checkpoint.save(manager, 1, saved)
    jax.jit(lambda x: x * 0, donate_argnums=0)(saved["arrays"]["kernel"])  # its memory is another array's from now on
    manager.wait_until_finished()
    for shape in ((2, 4), (8, 1), (1, 1)):
        example = place(*shape, scale=0)
        found = checkpoint.restore(manager, example).trees
        for name, value in TREE.items():
            got = found["arrays"][name]
            assert got.sharding == example["arrays"][name].sharding, (shape, name, got.sharding)
            assert got.dtype == value.dtype and np.asarray(got).tobytes() == value.tobytes(), (shape, name)
        assert found["keys"].sharding == example["keys"].sharding
        np.testing.assert_array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(place(1, 1)["keys"]))


def check_optimizer(manager):
    """Moments of eight bits, and a state spread over four devices by a state on one."""
    mesh = jax.make_mesh((4,), ("rows",), devices=jax.devices()[:4])
    optimizer = precision.compressed(optax.adamw(1e-3), bits=8)
    create = jax.jit(lambda params, key: train.TrainState.create(params, optimizer, key))  # one program, not fifty
    state = create({"kernel": jnp.asarray(TREE["kernel"])}, jax.random.key(3))
    checkpoint.save(manager, 2, {"state": state, "count": 3})
    spread = jax.device_put(jax.tree.map(jnp.copy, state), NamedSharding(mesh, P()))
    found = checkpoint.restore(manager, {"state": spread, "count": 0}, donate=spread)
    assert spread.step.is_deleted() and found.trees["count"] == 3 and found.step == 2
    assert jax.tree.structure(found.trees["state"]) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(found.trees["state"]), jax.tree.leaves(state), strict=True):
        assert got.sharding.is_equivalent_to(NamedSharding(mesh, P()), got.ndim) and got.dtype == want.dtype
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


if __name__ == "__main__":
    for number, check in enumerate((check_meshes, check_optimizer)):
        opened = checkpoint.open_manager(f"{sys.argv[1]}/{number}")
        check(opened)
        opened.close()
