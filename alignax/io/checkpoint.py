"""Checkpoints: everything that makes the next step, as a dict of pytrees, written and read by Orbax.

    manager = checkpoint.open_manager("runs/mine/checkpoints", keep=2)
    checkpoint.save(manager, step, {"state": state, "position": position}, about={"config": ...})
    manager.wait_until_finished()                            # saving goes on in the background until then
    found = checkpoint.restore(manager, {"state": state, "position": position})     # the newest good one, or None

A checkpoint is a folder named by its step: Orbax writes it under another name and renames it when it is complete. The
leaves are arrays of any dtype (typed keys too), numpy arrays and numbers, or Python numbers and texts. They come back
in the structure and the shardings of an example, which may be those of another mesh. Every leaf has a digest: what is
read without complaint, though a byte of it changed, is noticed. Nothing is pickled. On several processes, each calls
these functions, and the folder is one that all of them see; what is not an array over all devices is the first one's.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import pathlib
import time
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from alignax.io.digests import digests

Trees = Mapping[str, Any]
LIBRARIES = ("alignax", "jax", "flax", "optax", "orbax-checkpoint", "numpy")
_PLAIN = (bool, int, float, str)
_CHUNK, _AT_ONCE = 2**26, 2**27  # bytes


class Found(NamedTuple):
    """A checkpoint that was read."""

    step: int
    trees: dict[str, Any]
    about: dict[str, Any]
    versions: dict[str, str]


def open_manager(folder: str | pathlib.Path, *, keep: int = 2, best: str = "") -> Any:
    """Orbax's `CheckpointManager` of a folder, which need not exist; it writes in the background.

    Args:
      folder: of the checkpoints.
      keep: how many of the newest to keep.
      best: the name of a metric; the checkpoint with the best is kept, too. More is better, unless it ends in loss.

    Warns:
      RuntimeWarning: when a checkpoint's metrics cannot be read; it is moved to the folder `damaged` beside.

    Raises:
      ValueError: for `keep` below 1.
      OSError: when there are checkpoints, but of none can the metrics be read; nothing is moved then.
    """
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    if keep < 1:
        raise ValueError(f"keep={keep}; expected at least 1 checkpoint")
    folder = pathlib.Path(folder).absolute()
    _check_metrics(folder)
    kept: list[Any] = [policies.LatestN(keep)]
    options: dict[str, Any] = {}
    if best:
        less = less_is_better(best)
        missing = math.inf if less else -math.inf  # a checkpoint between two evaluations is never the best
        options = {"best_fn": lambda metrics: metrics.get(best, missing), "best_mode": "min" if less else "max"}
        kept.append(policies.BestN(get_metric_fn=options["best_fn"], reverse=less, n=1))
    policy = policies.AnyPreservationPolicy(kept)
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True, **options),
    )


def less_is_better(metric: str) -> bool:
    """Whether `best` takes less of a metric for better: its name ends in loss."""
    return metric.endswith("loss")


def save(
    manager: Any, step: int, trees: Trees, *, about: Mapping[str, Any] | None = None, metrics: Trees | None = None
) -> None:
    """Begins to write a checkpoint; the arrays may be donated as soon as this returns.

    Waits for the one before, and raises what went wrong with it.

    Args:
      manager: of `open_manager`.
      step: which step made this; no checkpoint of it may exist.
      trees: what to write.
      about: JSON to write beside it, which `restore` gives back. Versions of the libraries are added.
      metrics: numbers by name, of which one may be the manager's `best`.

    Raises:
      TypeError: for a leaf that is neither an array nor a number or a text.
    """
    import orbax.checkpoint as ocp

    leaves = _flatten(trees)
    arrays = {name: _stored(leaf) for name, leaf in leaves.items() if not _is_plain(leaf)}
    found = digests(arrays)
    described = {name: _describe(leaf) | {"digest": found.get(name)} for name, leaf in leaves.items()}
    content = {"versions": versions(), "leaves": described, "about": dict(about or {})}
    arrays = {name: array for name, array in arrays.items() if array.size}  # Orbax writes no empty ones
    cut = {
        name: ocp.SaveArgs(chunk_byte_size=_CHUNK) for name in arrays
    }  # a reader decodes whole chunks, several at once
    stored = ocp.args.PyTreeSave(arrays, save_args=cut)
    args = ocp.args.Composite(arrays=stored, content=ocp.args.JsonSave(_sealed(content)))
    manager.save(step, args=args, metrics=dict(metrics or {}), force=True)


def restore(manager: Any, example: Trees, *, donate: Any = ()) -> Found | None:
    """The newest checkpoint that is whole, None if there is none at all.

    Newer ones that are not whole are said, and moved to the folder `damaged` beside.

    Args:
      manager: of `open_manager`.
      example: trees like those saved, whose structure and shardings the result has; arrays may be
        `jax.ShapeDtypeStruct`s.
      donate: a pytree of those of the example's arrays that are deleted before the checkpoint's are read, so that both
        are never in memory together.

    Warns:
      RuntimeWarning: when a newer checkpoint was passed over, with its folder and what is wrong with it.

    Raises:
      ValueError: when the example has other leaves than the checkpoint, by their names.
      OSError: when there are checkpoints, but none is whole; it says what is wrong with each.
    """
    manager.wait_until_finished()
    manager.reload()
    wrong: dict[int, str] = {}
    leaves: dict[str, Any] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        folder = pathlib.Path(manager.directory) / str(step)
        content, error = _attempt(lambda folder=folder: _unsealed(folder / "content" / "metadata"))
        if not error:
            _compare(folder, content["leaves"], _flatten(example))
            for leaf in jax.tree.leaves(donate):
                if leaf.size:  # empty ones are not in the checkpoint: they come back as they are
                    leaf.delete()
            leaves, error = _attempt(lambda folder=folder, content=content: _read(folder, content["leaves"], example))
        if not error:
            _, error = _attempt(lambda content=content, leaves=leaves: _verify(content["leaves"], leaves))
        if not error:
            if wrong:
                _pass_over(manager, wrong, step)
            trees = jax.tree.unflatten(jax.tree.structure(dict(example)), list(leaves.values()))
            return Found(step, trees, content["about"], content["versions"])
        wrong[step] = error
    if wrong:
        raise _none_whole(manager.directory, wrong)
    return None


@functools.cache  # a save need not look for them again
def versions() -> dict[str, str]:
    """Of this library and those it stands on; what is only on the path, not installed, has none."""
    found = {name: "" for name in LIBRARIES}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _flatten(trees: Trees) -> dict[str, Any]:
    """The leaves by the names of their paths."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(trees)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in found:
            raise ValueError(f"two leaves are named {name}; expected keys that tell them apart")
        if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic, *_PLAIN)):
            raise TypeError(f"{name}: {type(leaf).__name__}; expected an array, a number or a text")
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OUSMm":
            raise TypeError(f"{name}: a numpy array of dtype {leaf.dtype}; expected numbers")
        found[name] = leaf
    return found


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, _PLAIN) and not isinstance(leaf, np.generic)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _stored(leaf: Any) -> Any:
    """What Orbax gets: bits for keys, and a copy of what is not the devices', which the caller may change."""
    if not isinstance(leaf, jax.Array):
        return np.array(leaf)
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    # An array of this process alone, the same in each, is none that the processes could write together.
    return np.array(leaf) if jax.process_count() > 1 and leaf.is_fully_addressable else leaf


def _describe(leaf: Any) -> dict[str, Any]:
    if _is_plain(leaf):
        return {"value": leaf}
    key = {"impl": str(jax.random.key_impl(leaf))} if isinstance(leaf, jax.Array) and _is_key(leaf) else {}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} | key


def _compare(folder: pathlib.Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses an example that is not like what was saved."""
    wrong = [f"{name} is not in it" for name in expected if name not in saved]
    wrong += [f"{name} is not expected" for name in saved if name not in expected]
    for name in expected.keys() & saved.keys():
        old, new = (
            {k: v for k, v in x.items() if k in ("shape", "dtype")} for x in (saved[name], _describe(expected[name]))
        )
        if old != new:
            wrong.append(f"{name} is {old or 'a number'}, expected {new or 'a number'}")
    if wrong:
        said = "; ".join(sorted(wrong)[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ValueError(f"{folder}: other contents than expected: {said}")


def _read(folder: pathlib.Path, saved: Mapping[str, Any], example: Trees) -> dict[str, Any]:
    """The leaves by name, in the order of the example."""
    import orbax.checkpoint as ocp

    expected = _flatten(example)
    wanted = {name: leaf for name, leaf in expected.items() if not _is_plain(leaf) and np.prod(leaf.shape, dtype=int)}
    how = {name: _restore_args(leaf) for name, leaf in wanted.items()}
    handler: Any = ocp.PyTreeCheckpointHandler()
    arrays = {}
    for names in _groups(wanted):  # what Orbax reads at once lies in the host's memory beside the devices'
        args = {"item": dict.fromkeys(names, 0), "restore_args": {name: how[name] for name in names}}
        arrays |= handler.restore(folder / "arrays", args=ocp.args.PyTreeRestore(**args, partial_restore=True))
    found = {}
    for name, leaf in expected.items():
        found[name] = saved[name]["value"] if _is_plain(leaf) else _placed(arrays.pop(name, leaf), leaf, saved[name])
    return found


def _groups(leaves: Mapping[str, Any]) -> list[list[str]]:
    """The names of arrays to read together, in order; a group of several has no more than `_AT_ONCE` bytes."""
    groups: list[list[str]] = []
    used = 0
    for name, leaf in leaves.items():
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if not groups or used + size > _AT_ONCE:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


def _restore_args(leaf: Any) -> Any:
    import orbax.checkpoint as ocp

    if _on_mesh(leaf):
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _on_mesh(leaf: Any) -> bool:
    """Whether the leaf has its place on devices, so that each reads its part; otherwise it comes as a numpy array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is not None
    alone = jax.process_count() > 1 and isinstance(leaf, jax.Array) and leaf.is_fully_addressable
    return isinstance(leaf, jax.Array) and leaf.committed and not alone


def _placed(array: Any, leaf: Any, saved: Mapping[str, Any]) -> Any:
    """What was read, as the example's leaf is: a key, an array that is free to go to any device, a numpy scalar."""
    if isinstance(leaf, np.generic):
        return leaf.dtype.type(array)
    if isinstance(leaf, np.ndarray):
        return np.asarray(array)
    if _is_key(leaf):
        if not _is_key(array):
            array = jax.random.wrap_key_data(jnp.asarray(array), impl=saved["impl"])
    elif getattr(leaf, "weak_type", False) and leaf.ndim == 0:
        array = jnp.asarray(np.asarray(array).item())  # the dtype of a Python number gives way in arithmetic
    sharding = leaf.sharding if _on_mesh(leaf) or getattr(leaf, "committed", False) else None
    return jnp.asarray(array) if sharding is None else jax.device_put(array, sharding)


def _verify(saved: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
    """Refuses arrays that are not those that were written."""
    arrays = {name: leaf for name, leaf in leaves.items() if not _is_plain(leaf)}
    wrong = sorted(name for name, digest in digests(arrays).items() if digest != saved[name]["digest"])
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    if wrong:
        raise ValueError(f"other bits than were written, in {', '.join(wrong[:4])}{more}")


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return {"seal": _seal(content)} | content


def _unsealed(path: pathlib.Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if content.pop("seal", None) != _seal(content):
        raise ValueError(f"{path}: other contents than were written")
    return content


def _attempt(read: Any) -> tuple[Any, str]:
    """What `read()` gives, and an empty text; or None and what went wrong, in this process or in another."""
    try:
        found, error = read(), ""
    except Exception as problem:  # whatever damage makes a reader say
        said = str(problem).split(" [tensorstore_spec")[0].strip()  # of several hundred words
        found, error = None, f"{type(problem).__name__}: {said[:300]}"
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array(bool(error))))
        error = error or (f"process {failed[0]} could not read it" if failed.size else "")
    return found, error


def _pass_over(manager: Any, wrong: Mapping[int, str], step: int) -> None:
    """Says what is wrong with newer checkpoints, and moves them out of the way of those to come."""
    folder = pathlib.Path(manager.directory)
    for bad, error in wrong.items():
        _set_aside(folder / str(bad), f"{error}; goes on from step {step}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("alignax.io.checkpoint")
    manager.reload()


def _set_aside(folder: pathlib.Path, error: str) -> None:
    damaged = folder.parent / "damaged"
    if jax.process_index() == 0:
        damaged.mkdir(exist_ok=True)
        folder.rename(damaged / f"{folder.name}-{time.time_ns()}")
    warnings.warn(f"CHECKPOINT DAMAGED, moved to {damaged}: {folder}: {error}", RuntimeWarning, stacklevel=4)


def _none_whole(folder: Any, wrong: Mapping[int, str]) -> OSError:
    said = "".join(f"\n  {step}: {error}" for step, error in wrong.items()) or " process 0 says why"
    return OSError(f"{folder}: no checkpoint is whole:{said}")


def _check_metrics(folder: pathlib.Path) -> None:
    """Sets checkpoints aside whose metrics cannot be read: Orbax reads them before anything is asked of it.

    All are read before any is moved: were none to remain, it would look as if there had never been one.
    """
    wrong: dict[int, str] = {}
    none = False
    if jax.process_index() == 0:
        # What has another name is none: one that was being written when the process ended, which Orbax clears away.
        names = [path.name for path in folder.glob("*") if path.is_dir()]
        steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        wrong = {step: error for step in steps if (error := _wrong_metrics(folder / str(step)))}
        none = bool(wrong) and len(wrong) == len(steps)
    if jax.process_count() > 1:
        none = bool(multihost_utils.broadcast_one_to_all(np.int32(none)))
    if none:
        raise _none_whole(folder, wrong)
    for step, error in wrong.items():
        _set_aside(folder / str(step), error)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("alignax.io.checkpoint")


def _wrong_metrics(folder: pathlib.Path) -> str:
    """Why a checkpoint's metrics cannot be read; empty where they can, or there are none."""
    try:
        found = json.loads((folder / "metrics" / "metrics").read_text())
    except FileNotFoundError:
        return ""
    except (ValueError, OSError) as problem:
        return f"its metrics: {problem}"
    return "" if isinstance(found, dict) else "its metrics: are not named"
