"""Safetensors in and out: one open folder as a dict of lazy tensors, leaves read slice by slice, shards with an index.

Only what a device needs is read: a leaf that stacks L layers is filled layer by layer, and on a mesh each shard asks
for its own slices and is on its device before the next is read; a process reads for its own devices only. What is
written is gathered tensor by tensor. So the host never holds a whole model beside the devices' memory. Nothing but
safetensors is ever opened.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPES = ("F64", "F32", "F16", "BF16")
_DTYPE_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_NAMES |= {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_COMPARED = 2**22  # numbers of two tensors that are compared at a time
_LISTED = 8


class Tensor(NamedTuple):
    """One tensor of an open file, not read yet; `view[slices]` reads."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    view: Any


class Place(NamedTuple):
    """Where a leaf of the parameter tree is in a folder; a plain name means the whole tensor, kernels transposed.

    Leaves with the same tensor share its outputs (the last axis of a leaf), in the order of their places: each has a
    contiguous part of them, or with `groups` a part of each of that many equal groups, such as heads.
    """

    name: str  # of the tensor; a "{}" stands for the index along a leading axis of the leaf, such as the layer
    transposed: bool  # the folder has the last two axes the other way round
    groups: int = 1


class Leaf(NamedTuple):
    """One leaf of the parameter tree and the tensors it is made of: one per index along its `stacked` leading axes."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]
    stacked: int
    transposed: bool
    columns: np.ndarray | None  # of the tensor's last axis, in this tree's orientation; None: all of them
    width: int  # of that axis

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in the folder."""
        shape = (*self.shape[self.stacked : -1], self.width)
        return shape[::-1] if self.transposed else shape


def plan(tree: Any, names: Mapping[str, str | Place]) -> list[Leaf]:
    """The leaves of a tree of arrays or shapes, in its order, each with its tensors.

    names: by tree path.

    Raises:
      ValueError: when a leaf has no name.
    """
    places = {
        path: Place(place, transposed=path.endswith("/kernel")) if isinstance(place, str) else place
        for path, place in names.items()
    }
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return [_leaf(path, flat, places) for path in flat]


def _leaf(path: str, flat: Mapping[str, Any], places: Mapping[str, Place]) -> Leaf:
    if path not in places:
        raise ValueError(f"parameter {path!r} has no tensor name; named: {sorted(places)}")
    name, transposed, groups = places[path]
    shape, stacked = tuple(flat[path].shape), name.count("{}")
    tensors = tuple(name.format(*index) for index in np.ndindex(*shape[:stacked]))
    sizes = {other: flat[other].shape[-1] for other in places if other in flat and places[other].name == name}
    columns = _columns(path, sizes, groups) if len(sizes) > 1 else None
    dtype, width = np.dtype(flat[path].dtype), sum(sizes.values())
    return Leaf(path, shape, dtype, tensors, stacked, transposed, columns, width)


def _columns(path: str, sizes: Mapping[str, int], groups: int) -> np.ndarray:
    before = sum(list(sizes.values())[: list(sizes).index(path)])
    first = np.arange(groups) * (sum(sizes.values()) // groups) + before // groups
    return (first[:, None] + np.arange(sizes[path] // groups)[None, :]).reshape(-1)


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Every tensor of model.safetensors, or else of the files that model.safetensors.index.json names.

    Raises:
      ValueError: no safetensors, a file that is missing or broken, a tensor in two files, an index that lies.
    """
    weight_map = _weight_map(folder)
    with contextlib.ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        for file in sorted(set(weight_map.values())) or [_SINGLE]:
            for name, tensor in _open(folder / file, stack):
                if name in tensors:
                    raise ValueError(f"{folder}: tensor {name!r} is both in {tensors[name].file} and in {file}")
                tensors[name] = tensor
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise ValueError(f"{folder / _INDEX}: places tensor {name!r} in {file}, which does not have it")
        yield tensors


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[dict[str, Tensor]]:
    """Every tensor of one file.

    Raises:
      ValueError: when it is missing or broken.
    """
    with contextlib.ExitStack() as stack:
        yield dict(_open(path, stack))


def check(folder: Path, leaves: Sequence[Leaf], tensors: Mapping[str, Tensor], *, source: str = "config.json") -> None:
    """That the folder has each tensor of each leaf, in its shape and a floating-point dtype, and no others.

    source: the file that says what is expected.

    Raises:
      ValueError: naming all that are missing, not expected or wrong (at most eight of each).
    """
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    found = [(name, tensors[name]) for name in expected if name in tensors]
    shapes = [f"{n} has shape {t.shape}, expected {expected[n]}" for n, t in found if t.shape != expected[n]]
    dtypes = [
        f"{n} has dtype {t.dtype}, expected one of {', '.join(_DTYPES)}" for n, t in found if t.dtype not in _DTYPES
    ]
    problems = [
        f"{title}: {_listed(items)}"
        for title, items in (("missing", missing), ("not expected", extra), ("wrong", shapes + dtypes))
        if items
    ]
    if problems:
        raise ValueError(f"{folder}: the tensors do not fit {source}; " + "; ".join(problems))


def read(leaf: Leaf, tensors: Mapping[str, Tensor], sharding: jax.sharding.Sharding | None) -> jax.Array:
    """A leaf as a device array, or as the shards that `sharding` asks for, in the leaf's dtype.

    A process reads what its own devices need, each part once, and holds one part beside what the devices have.
    """
    if sharding is None:
        return jax.device_put(_read_part(leaf, tensors, tuple(slice(None) for _ in leaf.shape)))
    holders: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(item.indices(size)[:2] for item, size in zip(index or (), leaf.shape))
        holders.setdefault(bounds, []).append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    shards = []
    for bounds, places in holders.items():
        part = _read_part(leaf, tensors, tuple(slice(*bound) for bound in bounds))
        shards += jax.block_until_ready([jax.device_put(part, place) for place in places])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards, dtype=leaf.dtype)


def write(
    folder: Path | None,
    leaves: Sequence[Leaf],
    arrays: Sequence[Any],
    max_shard_bytes: int | None = None,
    *,
    single: str = _SINGLE,
) -> None:
    """Writes model.safetensors, or numbered files of at most `max_shard_bytes` (one tensor at least) and their index.

    One tensor is gathered on the host at a time. Where the arrays lie on several processes all of them call this, and
    the one with a folder writes; the others pass None. max_shard_bytes: None for one file, whose name is `single`.
    """
    parts: dict[str, list[tuple[Leaf, Any, tuple[int, ...]]]] = {}
    for leaf, array in zip(leaves, arrays):
        for name, index in zip(leaf.names, np.ndindex(*leaf.shape[: leaf.stacked])):
            parts.setdefault(name, []).append((leaf, array, index))
    tensors = [_Written(name, found[0][0], _fetch(found)) for name, found in parts.items()]
    shards = [tensors] if max_shard_bytes is None else _split(tensors, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [single] if len(shards) == 1 else files
    for file, shard in zip(files, shards):
        _write_file(None if folder is None else folder / file, shard)
    if len(shards) > 1 and folder is not None:
        weight_map = {tensor.name: file for file, shard in zip(files, shards) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.size for tensor in tensors)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


class _Written(NamedTuple):
    """A tensor to write; `leaf` is one of those in it."""

    name: str
    leaf: Leaf
    fetch: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.leaf.tensor_shape) * self.leaf.dtype.itemsize


def _write_file(path: Path | None, tensors: Sequence[_Written]) -> None:
    """One file, see https://huggingface.co/docs/safetensors: the header's length, the header, one tensor after another.

    Wide dtypes come first, so that all are aligned.
    """
    tensors = sorted(tensors, key=lambda tensor: -tensor.leaf.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        dtype = _DTYPE_NAMES[tensor.leaf.dtype.name]
        header[tensor.name] = {"dtype": dtype, "shape": tensor.leaf.tensor_shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.nullcontext() if path is None else path.open("wb") as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            values = tensor.fetch()
            if file is not None:
                file.write(values.reshape(-1).view(np.uint8).data)


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN; some of their rows are read at a time."""
    if left.shape != right.shape:
        return False
    count, rows = left.shape[0], max(1, _COMPARED // max(1, math.prod(left.shape[1:])))
    parts = [slice(start, min(start + rows, count)) for start in range(0, count, rows)]
    return all(np.array_equal(left.view[part], right.view[part], equal_nan=True) for part in parts)


def _weight_map(folder: Path) -> dict[str, str]:
    if (folder / _SINGLE).is_file():
        return {}
    if not (folder / _INDEX).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        hint = f"; {_listed(pickled)} is never opened: convert it to safetensors" if pickled else ""
        raise ValueError(f"{folder}: has neither {_SINGLE} nor {_INDEX}{hint}")
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX}: has no weight_map from tensor names to files")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ValueError(f"{folder / _INDEX}: names {file!r}; expected a .safetensors file in the same folder")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
      ValueError: naming the file, when it is absent, not JSON or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def _open(path: Path, stack: contextlib.ExitStack) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, though {_INDEX} names it")
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a whole safetensors file ({error})") from None
    for name in file.keys():
        view = file.get_slice(name)
        yield name, Tensor(path.name, view.get_dtype(), tuple(view.get_shape()), view)


def _read_part(leaf: Leaf, tensors: Mapping[str, Tensor], index: tuple[slice, ...]) -> np.ndarray:
    bounds = [item.indices(size)[:2] for item, size in zip(index, leaf.shape)]
    part = np.empty([stop - start for start, stop in bounds], leaf.dtype)
    inner, columns = [slice(*bound) for bound in bounds[leaf.stacked :]], None
    if leaf.columns is not None:
        columns = leaf.columns[inner[-1]]
        inner[-1] = slice(columns.min(), columns.max() + 1)
        columns = columns - inner[-1].start
    inner = tuple(inner[::-1] if leaf.transposed else inner)
    names = dict(zip(np.ndindex(*leaf.shape[: leaf.stacked]), leaf.names))
    for at in np.ndindex(*part.shape[: leaf.stacked]):
        values = tensors[names[tuple(i + start for i, (start, _) in zip(at, bounds))]].view[inner]
        values = values.T if leaf.transposed else values
        part[at] = values if columns is None else values[..., columns]
    return part


def _fetch(parts: Sequence[tuple[Leaf, Any, tuple[int, ...]]]) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        first = parts[0][0]
        values = _on_host(*parts[0][1:])
        if first.columns is not None:
            values = np.empty((*first.shape[first.stacked : -1], first.width), first.dtype)
            for leaf, array, index in parts:
                values[..., leaf.columns] = _on_host(array, index)
        return np.ascontiguousarray(values.T if first.transposed else values)

    return fetch


def _on_host(array: Any, index: tuple[int, ...]) -> np.ndarray:
    sharding = getattr(array, "sharding", None)
    if isinstance(sharding, NamedSharding) and not (sharding.is_fully_addressable or sharding.is_fully_replicated):
        return np.asarray(_gather(sharding.mesh)(array, index))
    return np.asarray(array[index])


@functools.cache
def _gather(mesh: Any) -> Callable:
    return jax.jit(lambda array, index: array[index], out_shardings=NamedSharding(mesh, PartitionSpec()))


def _split(tensors: list[_Written], limit: int) -> list[list[_Written]]:
    shards, used = [[]], 0
    for tensor in tensors:
        if shards[-1] and used + tensor.size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.size
    return shards


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
