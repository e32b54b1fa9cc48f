"""Where arrays live: a mesh, ordered rules for parameters, rows over the data axis.

A rule is `(regex, PartitionSpec, ...)`; the first whose regex is found in a leaf's path ("layers/attn/q/kernel")
decides, and of its specs the first by which the leaf divides. Optimizer state follows the same rules, because its paths
end in the paths of the parameters; numbers need none. Axes that a rule names and a mesh lacks are left out, so one set
of rules serves a laptop and a pod. What lies between the parameters, activations, `constrain` puts where it belongs.

What is used once an update, optimizer state and a reference's parameters, may live in the host's memory instead:
`shardings(..., host=regex)` says which leaves. `alignax.leafwise` updates such a state, and `alignax.train.make_update`
fetches frozen parameters. See https://docs.jax.dev/en/latest/notebooks/host-offloading.html.
"""

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Sequence[tuple[Any, ...]]  # (regex, PartitionSpec, and others for leaves that do not divide by it)

# The axes of a mesh by name, those that talk most last, where devices are nearest. Rows lie over the first three;
# parameters over "fsdp", experts over "expert", the tokens of a row over "sequence", heads and the like over "tensor".
AXES = ("data", "fsdp", "expert", "sequence", "tensor")
ROW_AXES = ("data", "fsdp", "expert")
HEAD_AXES = ("tensor", "sequence")  # of attention, which wants whole rows


def make_mesh(devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """A mesh with named axes over all devices: `make_mesh(data=-1, tensor=2)`; one size may be -1, for what is left.

    The neighbours along the last axes talk most (see `AXES`); on TPUs they are neighbours on the chips' torus.

    Raises:
      ValueError: when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in axes.values()]
    if math.prod(sizes) != len(devices):
        raise ValueError(f"make_mesh: axes {axes} do not multiply to {len(devices)} devices")
    grid = np.array(devices).reshape(sizes)
    if devices[0].platform == "tpu":
        with contextlib.suppress(NotImplementedError, ValueError, AssertionError):  # a torus that it cannot divide so
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes))


def shardings(tree: Any, mesh: Mesh | AbstractMesh, rules: Rules, *, host: str | None = None) -> Any:
    """The `NamedSharding` of every leaf, by the first rule that matches its path.

    Works on arrays and on shapes (`jax.eval_shape`), for a mesh of devices or an abstract one. A leaf with fewer axes
    than its rule (a step counter, a factored moment) is replicated; so are the scales of a compressed state along an
    axis that has too few of them.

    Args:
      tree: of arrays or shapes.
      mesh: what the rules' axes are axes of.
      rules: `(regex, PartitionSpec, ...)`, in order; see above.
      host: a regex; leaves with axes whose path it is found in are kept in the host's memory (pinned, in the same
        shards), as `host=r"^opt_state/"` of a train state or `host=""` of a reference. `jax.pmap` takes no such arrays.

    Raises:
      ValueError: when no rule matches a leaf that is more than a number, or an axis of it does not divide among the
        devices by any spec of its rule.
    """

    def place(path, leaf):
        name = path_name(path)
        specs = next((specs for pattern, *specs in rules if re.search(pattern, name)), None)
        if specs is None and leaf.shape:
            raise ValueError(f"shardings: no rule matches {name!r}; rules: {[pattern for pattern, *_ in rules]}")
        kept = host is not None and leaf.shape and re.search(host, name)
        where = NamedSharding(mesh, _fit(name, leaf.shape, specs or [PartitionSpec()], mesh))
        return where.with_memory_kind("pinned_host") if kept else where

    return jax.tree_util.tree_map_with_path(place, tree)


def born_sharded(fn: Callable, mesh: Mesh, rules: Rules, *, host: str | None = None) -> Callable:
    """`fn` compiled so that every array it returns is created in its shards and no device ever holds a whole one.

    `state = born_sharded(lambda key: TrainState.create(model.init(key), optimizer), mesh, rules)(key)`; `host` as in
    `shardings`.
    """

    def call(*args):
        where = shardings(jax.eval_shape(fn, *args), mesh, rules, host=host)
        return jax.jit(fn, out_shardings=where)(*args)

    return call


def in_place(update: Callable) -> Callable:
    """`update(state, ...) -> state, ...` compiled; the new state lies where the old one lay, which is donated.

    Without being told, XLA may leave a parameter as the last computation had it: on a mesh whose attention exchanges
    tokens for heads, in other shards than the rules gave it. The next call would compile another program, and a run
    that goes on from a checkpoint, whose state lies by the rules, would not come to the same bits.
    """
    compiled: list[Callable] = []

    def call(state: Any, *args: Any) -> Any:
        if not compiled:
            where = jax.tree.map(lambda x: x.sharding, state)
            compiled.append(jax.jit(update, donate_argnums=0, out_shardings=(where, None)))
        return compiled[0](state, *args)

    return call


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Inside `jax.jit`: `x` split over the mesh in effect (`jax.set_mesh`), one entry an axis of `x`; else as it is.

    An entry is a name, a tuple of names, or None for an axis that no device has only a part of. Names that the mesh
    lacks are left out, and so are the last ones of an entry by which the axis does not divide.
    """
    free = free_axes()
    if not free:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(divisors(free, *pair) for pair in zip(x.shape, axes))))


def free_axes() -> dict[str, int]:
    """The axes of the mesh in effect over which XLA splits, with their sizes, none of them 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def gathered(params: Any, rules: Rules, *, axis: str = "fsdp") -> Any:
    """Inside `jax.jit`: parameters whole along an axis of the mesh in effect, split as the rules say along the others.

    For what reads them again and again, such as decoding: they are sent once, not for every token.

    Raises:
      ValueError: as `shardings`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in free_axes():
        return params
    kept = {name: mesh.shape[name] for name in mesh.axis_names if name != axis}
    where = shardings(params, AbstractMesh(tuple(kept.values()), tuple(kept)), rules)
    return jax.tree.map(lambda x, place: jax.lax.with_sharding_constraint(x, place.spec), params, where)


def divisors(sizes: Mapping[str, int], count: int, entry: Any) -> tuple[str, ...]:
    """The names of an entry that `sizes` has, without the last ones if `count` does not divide by all."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    names = tuple(name for name in names if name in sizes)
    while names and count % math.prod(sizes[name] for name in names):
        names = names[:-1]
    return names


def to_device(tree: Any, after: Any = ()) -> Any:
    """Inside `jax.jit`: the same arrays, those that lie in the host's memory copied to the device's.

    The copy waits until the arrays of `after` are there, if any; otherwise the compiler would make it as early as it
    can, and once for a whole loop.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if not any(map(on_host, leaves)):
        return tree
    held = [x for x in leaves if on_host(x)]
    if jax.tree.leaves(after):
        held, _ = jax.lax.optimization_barrier((held, after))
    fetched = iter([jax.device_put(x, jax.memory.Space.Device) for x in held])
    return treedef.unflatten([next(fetched) if on_host(x) else x for x in leaves])


def back(tree: Any, origin: Any) -> Any:
    """Inside `jax.jit`: the leaves of `tree` whose counterparts in `origin` lie in the host's memory copied there."""
    return jax.tree.map(lambda x, y: jax.device_put(x, jax.memory.Space.Host) if on_host(y) else x, tree, origin)


def on_host(x: Any) -> bool:
    """Whether an array, traced or not, lies in the host's memory beside a device's."""
    return isinstance(x, jax.Array) and jax.typeof(x).memory_space == jax.memory.Space.Host


def row_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh over which rows lie, of `ROW_AXES`."""
    return tuple(axis for axis in ROW_AXES if axis in mesh.axis_names)


def row_devices(mesh: Mesh | AbstractMesh) -> int:
    """How many devices take different rows."""
    return math.prod(mesh.shape[axis] for axis in row_axes(mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Puts a batch on the mesh, its rows over the axes of `ROW_AXES` that the mesh has.

    Raises:
      ValueError: when the rows do not divide among the devices of those axes.
    """
    where, count = NamedSharding(mesh, PartitionSpec(row_axes(mesh))), row_devices(mesh)

    def put(path, leaf):
        if leaf.shape[0] % count:
            raise ValueError(
                f"shard_batch: batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which do not divide among "
                f"{count} devices of the axes {row_axes(mesh)}"
            )
        return place(leaf, where)

    return jax.tree_util.tree_map_with_path(put, batch)


def place(tree: Any, where: Any) -> Any:
    """Arrays that every process has whole, in the shardings `where`: of each only what its own devices take is copied.

    Args:
      tree: of arrays, the same in all processes; global ones are moved.
      where: a sharding, or a tree of them.
    """
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    if jax.process_count() == 1:
        return jax.device_put(tree, where)
    return jax.tree.map(_place, tree, where)


def replicate(tree: Any, devices: Sequence[Any] | None = None) -> Any:
    """A copy of every leaf on each device, under a new leading axis: the state that `jax.pmap` wants."""
    devices = jax.local_devices() if devices is None else devices
    sharding = NamedSharding(Mesh(np.array(devices), ("device",)), PartitionSpec("device"))

    def copies(x):
        x = jax.numpy.asarray(x)
        return jax.device_put(jax.numpy.broadcast_to(x, (len(devices), *x.shape)), sharding)

    return jax.tree.map(copies, tree)


def unreplicate(tree: Any) -> Any:
    """The first device's copy of what `jax.pmap` returned."""
    return jax.tree.map(lambda x: x[0], tree)


def split_rows(batch: Any, devices: int) -> Any:
    """Every leaf [B, ...] as [devices, B / devices, ...]: the batch that `jax.pmap` wants.

    Raises:
      ValueError: when the rows do not divide among the devices.
    """

    def split(path, leaf):
        if leaf.shape[0] % devices:
            raise ValueError(
                f"split_rows: batch{jax.tree_util.keystr(path)} has {leaf.shape[0]} rows for {devices} devices"
            )
        return leaf.reshape(devices, -1, *leaf.shape[1:])

    return jax.tree_util.tree_map_with_path(split, batch)


def _place(x: Any, where: jax.sharding.Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(_same, out_shardings=where)(x)
    if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_place(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
    x = np.asarray(x)
    # `jax.device_put` would first compare what all processes have
    return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


def _same(x: jax.Array) -> jax.Array:
    return x


def path_name(path: Sequence[Any]) -> str:
    """A key path as "a/b/c"."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _fit(name: str, shape: tuple[int, ...], specs: Sequence[PartitionSpec], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The first spec by which the shape divides, without the axes that the mesh lacks."""
    if any(len(spec) > len(shape) for spec in specs):
        return PartitionSpec()
    for spec in specs:
        entries = [_present(entry, mesh) for entry in spec]
        parts = [math.prod(mesh.shape[axis] for axis in entry) for entry in entries]
        if not any(size % count for size, count in zip(shape, parts)):
            return PartitionSpec(*(entry if len(entry) > 1 else (entry[0] if entry else None) for entry in entries))
    if "block_scales" in name.split("/"):  # of `precision.compressed`: few numbers
        return _fit(name, shape, [PartitionSpec(*spec[: len(spec) - 1]) for spec in specs], mesh)
    asked = " or ".join(map(str, specs))
    raise ValueError(f"shardings: {name!r} of shape {shape} does not divide by {dict(mesh.shape)} as {asked} asks")


def _present(entry: Any, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    axes = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    return tuple(axis for axis in axes if axis in mesh.shape)
