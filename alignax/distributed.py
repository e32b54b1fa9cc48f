"""Several processes: joined into one program, and data between what each of them has and arrays over all devices.

Every process runs the same script on its own devices, and computes together with the others on global arrays. What is
the same everywhere, such as a batch from a deterministic stream, `sharding.shard_batch` puts on the mesh; what each
process has for itself, such as rows of a file of its own, `from_own_rows` does. The other way round, `own_rows` are the
rows that this process looks after, where text must be made of tokens and rewards of text, and `join_rows` tells all
processes what each found out about its own. In a single process all of this is the obvious thing, at no cost.
"""

import glob
import importlib.util
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import ArrayLike

from alignax.sharding import place, row_axes, row_devices


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    heartbeat_seconds: int = 30,
    wait_seconds: int = 300,
    shutdown_seconds: int = 300,
) -> bool:
    """Joins the processes that the arguments or the environment name; says whether there are several.

    On Cloud TPU, under SLURM (`srun`) and Open MPI (`mpirun`) no argument is needed. Call it before anything touches a
    device, with the same arguments everywhere but for `process`. A second call does nothing.

    Args:
      coordinator: HOST:PORT of the first process; the port must be free there.
      processes: how many there are.
      process: the number of this one, from 0.
      heartbeat_seconds: after so long a silence a process counts as dead, and JAX ends all others (by SIGABRT).
      wait_seconds: how long to wait for the others at the start.
      shutdown_seconds: how long at the end, also after an error of one process: then it and all others are ended (by
        SIGABRT). A process that is done must not wait in vain for one that still writes: it would fail.

    Raises:
      ValueError: for arguments that are wrong, or of which some are missing.
      RuntimeError: when a device was touched before, or the others did not come.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    found = _explicit(coordinator, processes, process)
    if found is None and not _named_by_cloud_tpu():
        return False
    if found is not None and found.get("num_processes") == 1:
        return False
    arguments: dict[str, Any] = found or {}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # which XLA's CPU client asks for at its birth
    # Two programs at once may each hold the threads that the other's collectives wait for: seen on two cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=wait_seconds,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=shutdown_seconds,
        )
    except OSError as error:
        if found is not None:
            raise
        warnings.warn(f"initialise: no metadata server tells of other hosts: {error}", RuntimeWarning, stacklevel=2)
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def from_own_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays of the rows that each process has: the first process's come first.

    Args:
      tree: arrays that lead with this process's rows, as many as its devices take; processes whose devices take the
        same rows, because the mesh splits them over its other axes, have the same.
      mesh: over whose row axes they go.

    Raises:
      ValueError: when the rows do not divide among the devices of this process.
    """
    where = NamedSharding(mesh, PartitionSpec(row_axes(mesh)))
    own = where.addressable_devices_indices_map((row_devices(mesh),))
    shares = len({index[0].start for index in own.values() if index is not None})

    def put(path, leaf):
        if leaf.shape[0] % shares:
            raise ValueError(
                f"from_own_rows: {jax.tree_util.keystr(path)} has {leaf.shape[0]} rows, which do not divide among the "
                f"{shares} devices of this process that take rows"
            )
        return jax.make_array_from_process_local_data(where, np.asarray(leaf))

    return jax.tree_util.tree_map_with_path(put, tree)


def own_rows(x: Any) -> np.ndarray:
    """The numbers of the rows of `x` that this process looks after, ascending: each row belongs to one process.

    It is one whose devices hold the row. Of a numpy array, or one of this process alone, they are all.
    """
    return np.arange(len(x)) if _is_own(x) else _rows_of_processes(x)[jax.process_index()]


def take_own_rows(tree: Any) -> Any:
    """The rows of `own_rows`, as numpy arrays."""
    return jax.tree.map(_take_own, tree)


def join_rows(values: Any, x: Any) -> Any:
    """What each process knows about its `own_rows(x)`, [own, ...], as [rows of x, ...] on every process, numpy.

    All processes must call it, with the same tree of arrays of at most 32 bits; it is for small things.
    """
    if _is_own(x):
        return jax.tree.map(np.asarray, values)
    rows = _rows_of_processes(x)
    most = max(map(len, rows))

    def join(value: ArrayLike) -> np.ndarray:
        own = np.asarray(value)
        padded = np.zeros((most, *own.shape[1:]), own.dtype)
        padded[: len(own)] = own
        whole = np.zeros((len(x), *own.shape[1:]), own.dtype)
        for part, chosen in zip(multihost_utils.process_allgather(padded), rows):
            whole[chosen] = part[: len(chosen)]
        return whole

    return jax.tree.map(join, values)


def to_host(tree: Any) -> Any:
    """The tree with numpy arrays for device arrays, whole on every process; all of them must call it.

    What no single process holds is gathered leaf by leaf: for rollouts and the like, not for parameters.
    """
    return jax.device_get(jax.tree.map(_gathered, tree))


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them must call it."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None where only Cloud TPU could have named them."""
    given = {"coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"), "processes": processes}
    given |= {"process": process}
    if all(value is None for value in given.values()):
        launcher = _launcher(os.environ)
        if launcher is None:
            return None
        name, count, number, knows = launcher
        if not knows and count > 1:
            raise ValueError(
                f"initialise: {name} started {count} processes and does not say where the first one is; expected a "
                "coordinator, HOST:PORT of the first process"
            )
        return {"num_processes": count, "process_id": number}
    if launcher := _launcher(os.environ):
        given |= {name: x for name, x in zip(("processes", "process"), launcher[1:]) if given[name] is None}
    if missing := [name for name, value in given.items() if value is None]:
        named = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        raise ValueError(f"initialise: {named} without {' and '.join(missing)}; expected all three, or none")
    address = re.fullmatch(r"\[?[\w.:-]+\]?:(\d+)", given["coordinator"])
    if not address or int(address[1]) >= 2**16:  # with which JAX ends the process, and explains nothing
        raise ValueError(f"initialise: coordinator={given['coordinator']!r}; expected HOST:PORT")
    if not 0 <= given["process"] < given["processes"]:
        raise ValueError(
            f"initialise: process={given['process']} of processes={given['processes']}; expected 0 to one less than "
            "there are"
        )
    names = {"coordinator": "coordinator_address", "processes": "num_processes", "process": "process_id"}
    return {names[name]: value for name, value in given.items()}


def _launcher(environment: Mapping[str, str]) -> tuple[str, int, int, bool] | None:
    """Who started this process as one of several: name, their count, this one's number, whether it knows the first."""
    if environment.keys() >= {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"}:
        count, number = (int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK"))
        return "Open MPI", count, number, "OMPI_MCA_orte_hnp_uri" in environment  # its fifth version lacks this
    needed = {f"SLURM_{name}" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")}
    # A batch script has the variables of its job, though only `srun` starts the processes: its own step has one.
    if environment.keys() >= needed and environment.get("SLURM_STEP_NUM_TASKS") != "1":
        return "SLURM", int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]), True
    return None


def _named_by_cloud_tpu() -> bool:
    """Whether this is a TPU machine whose environment, or metadata server, which JAX asks, may name several hosts."""
    if "cpu" == os.environ.get("JAX_PLATFORMS") or not importlib.util.find_spec("libtpu"):
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        return "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES", "1")) > 1
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in os.environ


def _is_own(x: Any) -> bool:
    """Whether this process has all of `x`, and knows of no others that do."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _gathered(x: Any) -> Any:
    if _is_own(x) or x.is_fully_replicated:
        return x
    return place(x, NamedSharding(_mesh_of(x), PartitionSpec())).addressable_data(0)


def _take_own(x: Any) -> np.ndarray:
    if _is_own(x):
        return np.asarray(x)
    if any(x.sharding.spec[1:]):  # whole rows on each device
        x = place(x, NamedSharding(_mesh_of(x), PartitionSpec(x.sharding.spec[0])))
    mine = set(own_rows(x).tolist())
    held = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    parts = [np.asarray(data) for start, data in sorted(held.items()) if start in mine]
    return np.concatenate(parts) if parts else np.zeros((0, *x.shape[1:]), x.dtype)


def _mesh_of(x: jax.Array) -> Mesh:
    if not isinstance(x.sharding, NamedSharding) or not isinstance(x.sharding.mesh, Mesh):
        raise ValueError(f"an array with the sharding {x.sharding}; expected one on a mesh (NamedSharding)")
    return x.sharding.mesh


def _rows_of_processes(x: jax.Array) -> list[np.ndarray]:
    """The rows that each process looks after: those who hold the same share of the rows take turns."""
    holders: dict[tuple[int, int], set[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        start, stop, _ = index[0].indices(x.shape[0])
        holders.setdefault((start, stop), set()).add(device.process_index)
    rows: list[list[np.ndarray]] = [[] for _ in range(jax.process_count())]
    for number, ((start, stop), processes) in enumerate(sorted(holders.items())):
        rows[sorted(processes)[number % len(processes)]].append(np.arange(start, stop))
    return [np.concatenate(found) if found else np.arange(0) for found in rows]
