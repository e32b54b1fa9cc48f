"""Safetensors in and out: one open folder as a dict of lazy tensors, leaves read slice by slice, shards with an index.

Only what a device needs is read: a leaf that stacks L layers is filled layer by layer, and on a mesh each shard asks
for its own slices, so that the host never holds a whole model. Nothing but safetensors is ever opened.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_DTYPES = ("F64", "F32", "F16", "BF16")
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
    """A leaf as a device array, or as the shards that `sharding` asks for, in the leaf's dtype."""
    if sharding is None:
        return jax.device_put(_read_part(leaf, tensors, tuple(slice(None) for _ in leaf.shape)))
    parts: dict[tuple, np.ndarray] = {}  # devices that hold the same part share one reading of it

    def part(index: Any) -> np.ndarray:
        bounds = tuple(item.indices(size)[:2] for item, size in zip(index, leaf.shape))
        if bounds not in parts:
            parts[bounds] = _read_part(leaf, tensors, tuple(slice(*bound) for bound in bounds))
        return parts[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def write(
    folder: Path,
    leaves: Sequence[Leaf],
    arrays: Sequence[Any],
    max_shard_bytes: int | None = None,
    *,
    single: str = _SINGLE,
) -> None:
    """Writes model.safetensors, or numbered files of at most `max_shard_bytes` (one tensor at least) and their index.

    One file is gathered on the host at a time. max_shard_bytes: None for one file, whose name is `single`.
    """
    from safetensors.numpy import save_file

    parts: dict[str, list[tuple[Leaf, Any, tuple[int, ...]]]] = {}
    for leaf, array in zip(leaves, arrays):
        for name, index in zip(leaf.names, np.ndindex(*leaf.shape[: leaf.stacked])):
            parts.setdefault(name, []).append((leaf, array, index))
    tensors = [(name, _bytes(found[0][0]), _fetch(found)) for name, found in parts.items()]
    shards = [tensors] if max_shard_bytes is None else _split(tensors, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [single] if len(shards) == 1 else files
    for file, shard in zip(files, shards):
        (folder / file).touch()
        mode = (folder / file).stat().st_mode  # save_file would leave it readable to the owner only
        save_file({name: fetch() for name, _, fetch in shard}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(mode)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name, _, _ in shard}
        index = {"metadata": {"total_size": sum(size for _, size, _ in tensors)}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def equal(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same values, NaN equal to NaN."""
    return left.shape == right.shape and np.array_equal(left.view[:], right.view[:], equal_nan=True)


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


def _bytes(leaf: Leaf) -> int:
    return int(np.prod(leaf.tensor_shape)) * leaf.dtype.itemsize


def _fetch(parts: Sequence[tuple[Leaf, Any, tuple[int, ...]]]) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        first = parts[0][0]
        values = np.asarray(parts[0][1][parts[0][2]])
        if first.columns is not None:
            values = np.empty((*first.shape[first.stacked : -1], first.width), first.dtype)
            for leaf, array, index in parts:
                values[..., leaf.columns] = np.asarray(array[index])
        return np.ascontiguousarray(values.T if first.transposed else values)

    return fetch


def _split(tensors: list[tuple[str, int, Any]], limit: int) -> list[list[tuple[str, int, Any]]]:
    shards, used = [[]], 0
    for tensor in tensors:
        if shards[-1] and used + tensor[1] > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor[1]
    return shards


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more
