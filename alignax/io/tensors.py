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


class Leaf(NamedTuple):
    """One leaf of the parameter tree and the tensors it is made of: one per layer if stacked; kernels transposed."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]
    stacked: bool

    @property
    def transposed(self) -> bool:
        """Whether the folder has the last two axes the other way round."""
        return self.path.endswith("/kernel")

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in the folder."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def plan(tree: Any, names: Mapping[str, str]) -> list[Leaf]:
    """The leaves of a tree of arrays or shapes, in its order, each with its tensors.

    names: tree path to tensor name, "{}" in it standing for the layer.

    Raises:
      ValueError: when a leaf has no name.
    """
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path not in names:
            raise ValueError(f"parameter {path!r} has no tensor name; named: {sorted(names)}")
        stacked = "{}" in names[path]
        tensors = tuple(names[path].format(layer) for layer in range(leaf.shape[0] if stacked else 1))
        leaves.append(Leaf(path, tuple(leaf.shape), np.dtype(leaf.dtype), tensors, stacked))
    return leaves


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


def check(folder: Path, leaves: Sequence[Leaf], tensors: Mapping[str, Tensor]) -> None:
    """That the folder has each tensor of each leaf, in its shape and a floating-point dtype, and no others.

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
        raise ValueError(f"{folder}: the tensors do not fit config.json; " + "; ".join(problems))


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


def write(folder: Path, leaves: Sequence[Leaf], arrays: Sequence[Any], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or numbered files of at most `max_shard_bytes` (one tensor at least) and their index.

    One file is gathered on the host at a time.
    """
    from safetensors.numpy import save_file

    tensors: list[tuple[str, int, Callable[[], np.ndarray]]] = []
    for leaf, array in zip(leaves, arrays):
        size = int(np.prod(leaf.tensor_shape)) * leaf.dtype.itemsize
        tensors += [(name, size, _fetch(leaf, array, layer)) for layer, name in enumerate(leaf.names)]
    shards = _split(tensors, max_shard_bytes)
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    files = [_SINGLE] if len(shards) == 1 else files
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
    inner = tuple(slice(*bound) for bound in (bounds[1:] if leaf.stacked else bounds))
    inner = inner[::-1] if leaf.transposed else inner
    first, last = bounds[0] if leaf.stacked else (0, 1)
    for row, name in enumerate(leaf.names[first:last]):
        values = tensors[name].view[inner]
        target = part[row] if leaf.stacked else part
        target[...] = values.T if leaf.transposed else values
    return part


def _fetch(leaf: Leaf, array: Any, layer: int) -> Callable[[], np.ndarray]:
    def fetch() -> np.ndarray:
        values = np.asarray(array[layer] if leaf.stacked else array)
        return np.ascontiguousarray(values.T if leaf.transposed else values)

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
