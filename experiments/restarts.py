"""Runs of scripts as processes that may be killed, and whether what two of them left is the same.

Processes are forked from a server that has imported the scripts once (`multiprocessing`'s "forkserver"): a restart then
costs what loading and compiling cost; compiled programs are kept in a cache that all runs share. A process is one of
the system's own, and `kill -9` ends it as it would end any other.
"""

import dataclasses
import filecmp
import importlib
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from typing import Any, NamedTuple

SCRIPTS = ("sft", "preference", "reward_model", "kto", "grpo", "ppo", "online_preference")
LATER = ("transformers.tokenization_utils_fast", "transformers.models.auto.tokenization_auto", "orbax.checkpoint")
# Of an output folder, what tells when it was written, or by which command; the rest must be the same in every byte.
APART = ("config.json", "events.*", "checkpoints", "*.lock", ".*")


class Job(NamedTuple):
    """What a process runs: a script's module, the fields of its Config, and variables of its environment."""

    script: str
    options: Mapping[str, Any]
    environment: Mapping[str, str] = {}

    def into(self, output: pathlib.Path, **options: Any) -> "Job":
        """The same into another folder, with further fields."""
        return self._replace(options={**self.options, "output": output, **options})

    @property
    def output(self) -> pathlib.Path:
        """The folder that it writes."""
        return pathlib.Path(self.options["output"])


@dataclasses.dataclass
class Life:
    """A process that runs a job, what it said, and when it began."""

    job: Job
    log: pathlib.Path
    process: Any
    began: float

    @property
    def code(self) -> int | None:
        """Its exit status, -9 if it was killed, None while it runs."""
        return self.process.exitcode

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def said(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace")

    def wait(self, seconds: float = 600) -> int:
        """Its exit status, once it has ended.

        Raises:
          TimeoutError: when it runs longer than that; it is killed.
        """
        self.process.join(seconds)
        if self.code is None:
            self.kill()
            raise TimeoutError(f"{self.job.script} still ran after {seconds:.0f} s:\n{self.said()[-2000:]}")
        return self.code

    def until(self, seen: Callable[[], bool], seconds: float = 600) -> bool:
        """Waits until something is seen; False when the process ended first."""
        deadline = time.monotonic() + seconds
        while not seen():
            if self.code is not None:
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{self.job.script}: nothing seen in {seconds:.0f} s:\n{self.said()[-2000:]}")
            time.sleep(0.001)
        return self.code is None

    def kill(self) -> None:
        """`kill -9`, and waits for the end."""
        self.process.kill()
        self.process.join()


def prepare(cache: pathlib.Path) -> None:
    """Starts the server of which all processes are forked, with a cache of compiled programs for all of them."""
    before = dict(os.environ)
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    try:
        _CONTEXT.set_forkserver_preload([*SCRIPTS, *LATER, __name__])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


_CONTEXT = multiprocessing.get_context("forkserver")


def start(job: Job, log: pathlib.Path) -> Life:
    """Starts a job; what it prints goes to the file."""
    process = _CONTEXT.Process(target=_live, args=(job, str(log)), daemon=True)
    began = time.monotonic()
    process.start()
    return Life(job, log, process, began)


def finish(job: Job, log: pathlib.Path, seconds: float = 600) -> Life:
    """Runs a job to its end.

    Raises:
      RuntimeError: when it fails, with the last of what it said.
    """
    life = start(job, log)
    if life.wait(seconds):
        raise RuntimeError(f"{job.script} ended with {life.code}:\n{life.said()[-4000:]}")
    return life


def _live(job: Job, log: str) -> None:
    """What a process does: the job's script, as its command would."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ |= job.environment
    module = importlib.import_module(job.script)
    module.main(module.Config(**job.options))


def lines(folder: pathlib.Path) -> int:
    """How many lines of metrics a run has written."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def differences(left: pathlib.Path, right: pathlib.Path, apart: Sequence[str] = APART) -> list[str]:
    """Files that two output folders have not in common, or with other bytes, but for those whose name is `apart`."""

    def files(folder: pathlib.Path) -> set[pathlib.Path]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path for path in found if not any(part.match(x) for x in apart for part in (path, *path.parents))}

    ours, theirs = files(left), files(right)
    alone = [
        f"{path} only in {folder.name}"
        for folder, only in ((left, ours - theirs), (right, theirs - ours))
        for path in sorted(only)
    ]
    changed = [str(path) for path in sorted(ours & theirs) if not filecmp.cmp(left / path, right / path, shallow=False)]
    return alone + changed
