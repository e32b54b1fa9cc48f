"""Loads a model that would not fit twice into the memory it is given: a folder, and a checkpoint, straight into shards.

    python experiments/big_folder.py --megabytes 600 --limit 1100

makes a Hugging Face folder of 600 MB and a checkpoint of the same, and for either a process with eight simulated
devices that loads it onto their mesh and may take 1100 MB more than it had after loading a model of 1 MB. The devices'
memory is its own, so that little is left: a loader that reads everything first (`--loader everything`) fails.

The limit is RLIMIT_DATA, which counts the memory that a process alone may write to. RLIMIT_AS would also count what XLA
and the interpreter only reserve, and files that are mapped to be read.
"""

import dataclasses
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
from typing import Any, Literal

import jax
import numpy as np
import tyro

from alignax import sharding
from alignax.io import families, hf, tensors
from alignax.models import RULES, TransformerConfig, transformer

AXES: dict[str, Any] = {"fsdp": 4, "tensor": 2}
MEGABYTE = 10**6
Source = Literal["folder", "checkpoint"]
Loader = Literal["shards", "everything"]


@dataclasses.dataclass(frozen=True)
class Config:
    """A model, a limit, and what is loaded under it."""

    megabytes: int = 600
    """Size of the model."""
    limit: int = 1100
    """Megabytes that a process may take to load it."""
    sources: tuple[Source, ...] = ("folder", "checkpoint")
    """What is loaded, each by a process of its own."""
    loader: Loader = "shards"
    """everything: all tensors first, then the devices."""


def make_folder(folder: pathlib.Path, megabytes: int) -> None:
    """A random decoder of about so many megabytes in float32: a Hugging Face folder of several files, and its sums."""
    vocabulary, width, layers = 1024, 256, 8
    numbers = (megabytes * MEGABYTE // 4 - 2 * vocabulary * width) // layers - 4 * width**2
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": max(8, numbers // (3 * width) // 8 * 8),
        "num_layers": layers,
    }
    sizes |= {"num_heads": 8, "num_kv_heads": 8, "head_dim": width // 8}
    model = transformer(TransformerConfig(vocab_size=vocabulary, **sizes))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    hf.save(folder, model, params, max_shard_bytes=max(1, megabytes // 4) * MEGABYTE)
    (folder / "sums.json").write_text(json.dumps(sums(params)))


def sums(params: Any) -> dict[str, float]:
    """Of each leaf; those on devices shard by shard, each part of them once."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        parts = [leaf]
        if isinstance(leaf, jax.Array):
            parts = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        found[sharding.path_name(path)] = float(sum(np.sum(part, dtype=np.float64) for part in parts))
    return found


def load_under_limit(folder: pathlib.Path, limit: int, source: Source = "folder", loader: Loader = "shards") -> str:
    """Loads what `make_folder` made in a process that may take `limit` megabytes for it; what that process says.

    Raises:
      MemoryError: when it did not succeed, with the end of what it said.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    root = pathlib.Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, "--inside", str(folder), str(limit), source, loader]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise MemoryError(f"{source}, {loader}: exit code {done.returncode} under {limit} MB: {done.stderr[-2000:]}")
    return done.stdout.strip()


def _inside(folder: pathlib.Path, limit: int, source: Source, loader: Loader) -> None:
    """In the process that has the limit."""
    mesh = sharding.make_mesh(**AXES)
    load = {"folder": _load_folder, "checkpoint": _load_checkpoint}[source]
    with tempfile.TemporaryDirectory() as small:
        make_folder(pathlib.Path(small) / "model", 1)
        if source == "checkpoint":
            save_checkpoint(pathlib.Path(small) / "model")
        sums(load(pathlib.Path(small) / "model", mesh, loader))  # what is imported, compiled and started at first use
    base = _data_bytes()
    resource.setrlimit(resource.RLIMIT_DATA, (base + limit * MEGABYTE, resource.RLIM_INFINITY))
    params = load(folder, mesh, loader)
    size, used = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), _data_bytes() - base
    expected = json.loads((folder / "sums.json").read_text())
    np.testing.assert_allclose([*sums(params).values()], [*expected.values()], rtol=1e-9)
    megabytes = ", ".join(f"{name} {value / MEGABYTE:.0f} MB" for name, value in (("model", size), ("used", used)))
    print(f"{source}: {megabytes}, of {limit} MB beside {base / MEGABYTE:.0f} MB at the start; {loader}")


def _load_folder(folder: pathlib.Path, mesh: jax.sharding.Mesh, loader: Loader) -> Any:
    if loader == "shards":
        return hf.load(folder, mesh=mesh).params
    params = hf.load(folder).params
    return jax.device_put(params, sharding.shardings(params, mesh, RULES))


def save_checkpoint(folder: pathlib.Path) -> None:
    """A checkpoint of the folder's parameters, inside the folder."""
    from alignax.io import checkpoint

    manager = checkpoint.open_manager(folder / "checkpoints")
    checkpoint.save(manager, 1, {"params": hf.load(folder).params})
    manager.close()


def _load_checkpoint(folder: pathlib.Path, mesh: jax.sharding.Mesh, loader: Loader) -> Any:
    from alignax.io import checkpoint

    config = tensors.read_json(folder / "config.json")
    model = transformer(families.read_config(config, {}, dtype=np.float32, compute_dtype=None, remat=None))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = sharding.shardings(shapes, mesh, RULES)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    manager = checkpoint.open_manager(folder / "checkpoints")
    found = checkpoint.restore(manager, {"params": placed if loader == "shards" else shapes})
    manager.close()
    assert found is not None
    params = found.trees["params"]
    return params if loader == "shards" else jax.device_put(params, where)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts of this process."""
    found = re.search(r"^VmData:\s+(\d+) kB$", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main(config: Config) -> list[str]:
    """Makes the model, loads it, and says how; raises where a process failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        make_folder(path, config.megabytes)
        if "checkpoint" in config.sources:
            save_checkpoint(path)
        said = [load_under_limit(path, config.limit, source, config.loader) for source in config.sources]
    print("\n".join(said))
    return said


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        arguments: list[Any] = sys.argv[4:]
        _inside(pathlib.Path(sys.argv[2]), int(sys.argv[3]), *arguments)
    else:
        main(tyro.cli(Config))
