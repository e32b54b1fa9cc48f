"""The files of a run's output folder: which run it is of, who works there, what was logged, how it ended.

Only the first process touches them; `everywhere` tells the others.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Callable, Container, Iterator
from typing import IO, Any, TypeGuard

import jax
import numpy as np
from jax.experimental import multihost_utils

CONFIG, LINES, LOCK, RESULT = "config.json", "metrics.jsonl", "run.lock", "result.json"


def everywhere(first: Callable[[], Any]) -> Any:
    """What `first()` gives or raises on the first process, on every one; JSON."""
    if jax.process_count() == 1:
        return first()
    said: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            said = {"value": first()}
        except (ValueError, OSError) as error:
            said = {"error": str(error)}
    text = np.frombuffer(json.dumps(said).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8) if jax.process_index() else text
    said = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if "error" in said:
        raise ValueError(said["error"])
    return said["value"]


def inspect(folder: pathlib.Path, config: Any, *, resume: bool, accept: bool, free: Container[str]) -> dict[str, Any]:
    """What an earlier run left in the folder: fields of the Config that changed since, and its result at its step.

    Args:
      folder: the output folder; it may be missing or empty.
      config: of the run that is to begin.
      resume: whether it may go on from what there is.
      accept: whether it may although fields changed.
      free: names of fields that may change anyway.

    Returns:
      changes (field: [old, new]), step and result of a run that finished, 0 and None of none.

    Raises:
      ValueError: when the folder holds something that the run may not go on from, or may not be written.
    """
    nothing = {"changes": {}, "step": 0, "result": None}
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK) or (there.is_file() and there != folder):
        raise ValueError(f"output folder {folder}: {there} is no folder that this process may write in")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return nothing
    if not resume or not folder.is_dir():
        advice = "; go on from it with --resume auto" if (folder / CONFIG).is_file() else ""
        raise ValueError(f"output folder {folder} exists and is not empty; name a new one, or remove it{advice}")
    begun = {LOCK, LINES, f"{LINES}.new", f"{CONFIG}.new"}
    if {path.name for path in folder.iterdir()} <= begun:  # killed before it had written its Config
        return nothing
    take(folder).close()
    try:
        record = json.loads((folder / CONFIG).read_text())
        old = dict(record["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no output folder of a run, {CONFIG} cannot be read: {error}") from error
    new, script = described(config), script_of(config)
    if record.get("script", script) != script:
        raise ValueError(f"{folder}: begun by {record['script']}, this is {script}; name a new folder")
    changes = {
        name: [old.get(name), new.get(name)]
        for name in sorted({*old, *new})
        if name not in free and old.get(name) != new.get(name)
    }
    if changes and not accept:
        said = ", ".join(f"{name} was {was!r}, is {now!r}" for name, (was, now) in changes.items())
        raise ValueError(f"{folder}: begun with other options: {said}; give those, or --accept-changes to go on")
    return {"changes": changes, **_ended(folder / RESULT)}


def _ended(file: pathlib.Path) -> dict[str, Any]:
    """The step and the result that result.json holds; 0 and None where there is none."""
    advice = "remove it to go on from the last checkpoint"
    try:
        ended = json.loads(file.read_text())
    except FileNotFoundError:
        return {"step": 0, "result": None}
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error}); {advice}") from error
    if not _is_entry(ended) or not isinstance(ended.get("result"), dict):
        raise ValueError(f"{file}: is {str(ended)[:100]}; expected a step and a result by names; {advice}")
    return {"step": ended["step"], "result": ended["result"]}


def described(config: Any) -> dict[str, Any]:
    """A Config as JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def script_of(config: Any) -> str:
    """The name of the file that a Config's class is of; empty in a notebook."""
    return pathlib.Path(getattr(sys.modules[type(config).__module__], "__file__", None) or "").name


def take(folder: pathlib.Path) -> IO[str]:
    """Holds the folder until the result is closed, or the process is gone, however it went.

    Raises:
      ValueError: when another run holds it.
      OSError: when the folder cannot be written, or its file system knows no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        if not isinstance(error, BlockingIOError):
            raise
        raise ValueError(f"output folder {folder} is in use by {holder}; wait for it, or end it") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    lock.flush()
    return lock


def begin(folder: pathlib.Path, config: Any, *, step: int, changes: dict[str, Any]) -> None:
    """Writes config.json, or adds to it that the run goes on from a step, with which changes."""
    record = {
        "script": script_of(config),
        "command": sys.argv,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    file = folder / CONFIG
    resumed: list[Any] = []
    if step:
        earlier = json.loads(file.read_text())
        resumed = [*earlier.get("resumed", []), {"step": step, "changes": changes, "before": earlier["command"]}]
    write(file, record | {"config": described(config)} | ({"resumed": resumed} if resumed else {}))


def cut(folder: pathlib.Path, step: int) -> list[dict[str, Any]]:
    """Cuts metrics.jsonl back to what was logged up to a step, and gives that: a line half written goes, too."""
    kept = [(line, entry) for line, entry in _logged(folder) if entry["step"] <= step] if step else []
    _replace(folder / LINES, b"".join(line + b"\n" for line, _ in kept))
    return [entry for _, entry in kept]


def left(folder: pathlib.Path) -> str:
    """What an earlier life of the run logged, in words; empty when none began here."""
    if not (folder / CONFIG).exists():
        return ""
    steps = [entry["step"] for _, entry in _logged(folder)]
    return f"{LINES} ends with step {steps[-1]}" if steps else f"{LINES} is empty"


def _logged(folder: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of metrics.jsonl, as bytes and as JSON; others, after a full disk, say, are left out."""
    file = folder / LINES
    for line in file.read_bytes().split(b"\n")[:-1] if file.exists() else []:
        entry = None
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
        if _is_entry(entry):
            yield line, entry


def _is_entry(found: Any) -> TypeGuard[dict[str, Any]]:
    """Whether what was read is of a step."""
    return isinstance(found, dict) and type(found.get("step")) is int


def cleared(folder: pathlib.Path) -> pathlib.Path:
    """The folder, to be written anew: what an earlier life of the run left of it, whole or in parts, is removed."""

    def remove() -> None:
        for left in (folder, *folder.parent.glob(f".{folder.name}.*")):
            shutil.rmtree(left, ignore_errors=True)

    everywhere(remove)  # no process looks at the folder before it is gone
    return folder


def write(file: pathlib.Path, content: Any) -> None:
    """JSON, in the place of what was there in one go."""
    _replace(file, (json.dumps(content, indent=2, default=str) + "\n").encode())


def _replace(file: pathlib.Path, content: bytes) -> None:
    new = file.with_name(file.name + ".new")
    with new.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
