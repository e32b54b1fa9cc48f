"""What a script's run is, beside its algorithm: where it runs, what it keeps, how it goes on after it was killed.

The output folder has config.json, metrics.jsonl, TensorBoard scalars, curves.png, checkpoints/ with what
`alignax.io.checkpoint` writes, a file run.lock, held by the run that works there, and at the end result.json. Exit
codes are those below and `survivors.PEER_LOST`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import common
import due
import jax
import launch
import records
import suspects
import watch
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter
from tqdm import tqdm

from alignax import train
from alignax.io import checkpoint, digests

PREEMPTED = 75
"""Exit code of a run that was told to end, and has saved: run it again with --resume auto (sysexits.h: EX_TEMPFAIL)."""
STOPPED = 77
"""Exit code of a run that `watch` stopped; it has saved."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(launch.Options, watch.Options):
    """Fields of every script's Config."""

    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest whole checkpoint in the output folder, or start where there is nothing."""
    accept_changes: bool = False
    """Go on though other options were given than at the start."""
    checkpoint_every: int = 0
    """Updates between two checkpoints, of which the last is that of the last update. 0: with `resume auto` at each
    evaluation; otherwise none, but for the one when the run is told to end (SIGTERM, Ctrl-C)."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    keep_best: str = ""
    """A metric, such as held_out/loss: of the checkpoints at whose step it was logged keep the best, too. An evaluation
    at which it is better than ever saves one, whatever checkpoint_every says. More is better, unless the name ends in
    loss."""


# Fields that may differ when a run goes on, for they do not say what it computes: where it runs and is kept, what it is
# watched for. Another mesh gives the same results up to rounding.
FREE = {"output", *(f.name for f in dataclasses.fields(Options))}


class Run:
    """A run in its output folder, with a progress bar; it saves checkpoints and goes on from the newest.

    ```
    run = Run(config, total=config.steps, show=("loss",))                  # refuses a folder that holds something
    with run:                                                              # the first thing written
        everything = run.resume({"state": state, "position": position})    # as given, or as it was saved
        for step in range(run.step + 1, config.steps + 1):
            state, metrics = update(state, batch)
            run.log(step, metrics)                                         # waits for the device, once
            run.save(step, {"state": state, "position": position})         # when due
    return run.finish(result)
    ```
    Create it before anything costly, enter it before the loop. The picture is drawn when the run finishes, or
    when the block ends, whether it failed or was interrupted. On several processes all make the same calls, and the
    first one writes.

    Attributes:
      folder: `config.output`.
      step: the step of the checkpoint that `resume` found; 0 at the start.
      history: by metric, all that was logged and finite, also before the checkpoint: (step, value).
      result: what an earlier run of this folder gave to `finish`, or None: there is nothing left to do.

    Args:
      config: a dataclass, recorded in config.json; its fields of `Options` count, or their defaults.
      total: the number of steps.
      show: names of the metrics beside the progress bar.
      curves: names of the metrics in curves.png; empty for all that were logged, the first twelve.

    Raises:
      ValueError: when the folder holds something and `resume` is "no", is no folder or none of a run, is in use, or was
        begun with another Config, whose fields are named; for options of checkpoints that mean nothing.
    """

    def __init__(self, config: Any, *, total: int, show: Sequence[str] = (), curves: Sequence[str] = ()):
        self.folder = pathlib.Path(config.output)
        self.step = 0
        self.history: dict[str, list[tuple[int, float]]] = {}
        self._config, self._total, self._show, self._curves = config, total, show, curves
        self._options: dict[str, Any] = {
            f.name: getattr(config, f.name, f.default) for f in dataclasses.fields(Options)
        }
        evaluations = getattr(config, "evaluate_every", 0)
        every = self._options["checkpoint_every"] or (evaluations if self._options["resume"] == "auto" else 0)
        self._saves = due.Due(every, evaluations, self._options["keep_best"], total)
        self._check()
        self._writes = jax.process_index() == 0
        self._manager: Any = None
        self._resumable = self._drawn = False
        self._unsaved: dict[str, int] = {}
        self._lines: Any = None
        self._board: Any = None
        self._bar: Any = None
        self._lock: Any = None
        self._ending: tuple[int, str] | None = None  # exit code and reason
        self._handlers: dict[int, Any] = {}
        self._counts: watch.Counts = {}
        wanted = {"resume": self._options["resume"] == "auto", "accept": self._options["accept_changes"]}
        found = records.everywhere(lambda: records.inspect(self.folder, config, free=FREE, **wanted))
        self._changes: dict[str, Any] = found["changes"]
        self._finished: int = found["step"]
        self.result: dict[str, float] | None = found["result"] if found["step"] >= total else None
        if self.result is not None:
            print(f"{self.folder}: finished at step {found['step']}, nothing is left to do")

    def _check(self) -> None:
        """Refuses at once what would fail at the first checkpoint, or leave the run without any."""
        for name, least in {"checkpoint_every": 0, "keep": 1, "watch_window": 1}.items():
            if self._options[name] < least:
                raise ValueError(f"{name}={self._options[name]}; expected {least} or more")
        if self._options["keep_best"] and not self._saves.every:
            raise ValueError(
                f"keep_best={self._options['keep_best']!r} of a run that saves no checkpoints; expected --resume auto "
                "or --checkpoint-every, too"
            )

    def __enter__(self) -> "Run":
        records.everywhere(self._take)
        if self._options["resume"] == "no":
            self._open()
        return self

    def _take(self) -> None:
        self._lock = records.take(self.folder)

    def _open(self) -> None:
        """Brings the folder to the step that the run goes on from, and opens its files."""
        lines = records.everywhere(lambda: records.cut(self.folder, self.step))
        if (last := lines[-1]["step"] if lines else 0) < self.step and self._writes:
            warnings.warn(
                f"{self.folder / records.LINES}: ends with step {last}; expected all up to step {self.step}, from "
                "which the run goes on: what was logged between them is lost",
                RuntimeWarning,
                stacklevel=2,
            )
        for line in lines:
            for name, value in line.items():
                if name != "step" and value is not None:
                    self.history.setdefault(name, []).append((line["step"], value))
        if self._writes:
            records.begin(self.folder, self._config, step=self.step, changes=self._changes)
            self._lines = (self.folder / records.LINES).open("a")
            earlier = any(self.folder.glob("events.out.tfevents.*"))  # of which TensorBoard is to hide what came later
            self._board = SummaryWriter(
                str(self.folder), purge_step=(self.step + 1 if self.step else 0) if earlier else None
            )
        self._bar = tqdm(total=self._total, initial=self.step, disable=not self._writes, dynamic_ncols=True)

    def resume(self, everything: Mapping[str, Any], *, unsaved: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the newest whole checkpoint holds, in the shardings of what is given; in a new run, what is given.

        From here on SIGTERM and Ctrl-C let the next `save` save and end the run; a second Ctrl-C ends it at once.

        Args:
          everything: what makes the next step, a dict of pytrees of arrays and numbers. Train states in them are
            deleted when a checkpoint takes their place: both at once may not fit.
          unsaved: what else does, and is loaded by name when the run goes on: that it is the same will be checked.

        Warns:
          RuntimeWarning: when an earlier life of the run was killed before its first checkpoint; all begins again.

        Raises:
          ValueError: when the checkpoint is of something else, or what is `unsaved` has changed.
          OSError: when there are checkpoints, and none is whole.
        """
        self._unsaved = {name: digests.of_tree(tree) for name, tree in (unsaved or {}).items()}
        if self._options["resume"] == "auto":
            there = records.everywhere((self.folder / "checkpoints").exists)
            states = [tree for tree in jax.tree.leaves(dict(everything), is_leaf=_is_state) if _is_state(tree)]
            found = checkpoint.restore(self._checkpoints(), everything, donate=states) if there else None
            if found is not None:
                self._compare(found)
                self.step, everything = found.step, found.trees
            elif self._finished:
                raise ValueError(f"{self.folder}: finished at step {self._finished}, without checkpoints to go on from")
            elif (left := records.everywhere(lambda: records.left(self.folder))) and self._writes:
                warnings.warn(
                    f"{self.folder}: NOTHING TO GO ON FROM: a run began here and left no checkpoint, {left}; begins at "
                    "step 0 again",
                    RuntimeWarning,
                    stacklevel=2,
                )
            self._open()
        self._resumable = True
        self._listen()
        return dict(everything)

    def _checkpoints(self) -> Any:
        """The manager, made when it is needed: Orbax takes a while to import."""
        if self._manager is None:
            self._manager = checkpoint.open_manager(
                self.folder / "checkpoints", keep=self._options["keep"], best=self._options["keep_best"]
            )
        return self._manager

    def _compare(self, found: checkpoint.Found) -> None:
        """Says where the run goes on, and with which other libraries; refuses other data."""
        before = found.about["unsaved"]
        changed = [name for name, digest in self._unsaved.items() if before.get(name, digest) != digest]
        if changed and not self._options["accept_changes"]:
            names = ", ".join(changed)
            raise ValueError(f"{self.folder}: begun with other {names}; expected the same, or --accept-changes")
        other = {name: was for name, was in found.versions.items() if checkpoint.versions().get(name) != was}
        if self._writes:
            print(f"{self.folder}: goes on from step {found.step}" + (f", saved with {other}" if other else ""))

    def _listen(self) -> None:
        """Signals that ask the run to end; of several processes, JAX's runtime hears SIGTERM for all."""
        if threading.current_thread() is not threading.main_thread():
            return
        if jax.process_count() == 1:
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        self._handlers[signal.SIGINT] = signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: Any) -> None:
        del frame
        name = signal.Signals(number).name
        os.write(2, f"{name}: saves after this step, and ends\n".encode())  # print may be at work itself
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._ending = self._ending or (PREEMPTED, name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def log(
        self, step: int, metrics: Mapping[str, Any], rows: Callable[[], suspects.Rows] | None = None
    ) -> dict[str, float]:
        """Records one step's scalars and returns them as floats. One line, on disk at once; non-finite becomes null.

        `rows` gives the rows behind them, and is called when `watch` has something to say.

        Warns:
          RuntimeWarning: when a metric is NaN or infinite, or has crossed a bound of `watch`.

        Raises:
          watch.Stop: when one that is to end the run was crossed before `resume`; afterwards `save` saves and ends it.
        """
        values = {name: float(value) for name, value in common.to_host(dict(metrics)).items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for name, value in finite.items():
            self.history.setdefault(name, []).append((step, value))
        if self._writes:
            line = {name: value if name in finite else None for name, value in values.items()}
            self._lines.write(json.dumps({"step": step} | line) + "\n")
            self._lines.flush()
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
        self._bar.set_postfix({n: common.format_number(values[n]) for n in self._show if n in values}, refresh=False)
        self._bar.update(step - self._bar.n)
        try:
            watch.act(self._config, self.history, step, values, rows, self._counts)
        except watch.Stop as stop:
            if not self.end(STOPPED, str(stop)):
                raise
        return values

    def save(self, step: int, everything: Mapping[str, Any]) -> None:
        """Saves what makes the step after `step`, when it is due; to be called after `log`, once for each step.

        Warns:
          RuntimeWarning: when the metric of `keep_best` is logged at no checkpoint's step, so that none is kept for it.

        Raises:
          SystemExit: with code 75 when a signal asked the run to end, or that of `end`; what is given is saved by then.
          OSError: when a checkpoint could not be written; the ones before it stay.
        """
        if self._ending is None and multihost_utils.reached_preemption_sync_point(step):
            self._ending = PREEMPTED, "SIGTERM"
        if self._ending is None and not self._saves.at(step, self.history):
            return
        self._write(step, everything)
        if self._ending is not None:
            code, reason = self._ending
            self._settle()
            if self._writes:
                print(f"{reason}: saved at step {step}; --resume auto goes on from there", file=sys.stderr)
            raise SystemExit(code)

    def latest(self, prefix: str) -> dict[str, float]:
        """The metrics whose names begin so, as they were logged last; empty at the start."""
        found = {name: points[-1] for name, points in self.history.items() if name.startswith(prefix)}
        last = max((step for step, _ in found.values()), default=0)
        return {name: value for name, (step, value) in found.items() if step == last}

    def end(self, code: int, reason: str) -> bool:
        """Lets the next `save` save and end the run with this exit code; False when the run saves nothing."""
        self._ending = code, reason
        return self._resumable

    def _write(self, step: int, everything: Mapping[str, Any]) -> None:
        if self._writes:
            os.fsync(self._lines.fileno())  # no line before the checkpoint is lost, should the machine go down
        points = self.history.get(name := self._options["keep_best"], [])
        best = {name: points[-1][1]} if points and points[-1][0] == step else {}
        unmeasured = self._saves.unmeasured(step, self.history)
        if unmeasured and self._ending is None and self._writes:
            warnings.warn(unmeasured, RuntimeWarning, stacklevel=3)
        about = {"config": records.described(self._config), "unsaved": self._unsaved}
        with self._explained(step):
            checkpoint.save(self._checkpoints(), step, everything, about=about, metrics=best)

    def _settle(self) -> None:
        with self._explained(self._checkpoints().latest_step()):
            self._checkpoints().wait_until_finished()

    @contextlib.contextmanager
    def _explained(self, step: int | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            whole = f"those before stay in {self.folder / 'checkpoints'}"
            raise OSError(
                f"the checkpoint of step {step}, or the one before, was not written; {whole}: {error}"
            ) from error

    def finish(self, result: Mapping[str, Any]) -> dict[str, float]:
        """Records that nothing is left to do, and the last evaluation, which is returned as floats.

        Raises:
          OSError: when the last checkpoint could not be written; nothing is recorded then.
        """
        if self._manager is not None:
            self._settle()
        values = {name: float(value) for name, value in result.items()}
        if self._writes:
            self._draw()  # before what says that nothing is left to do
            records.write(self.folder / records.RESULT, {"step": max(self.step, self._total), "result": values})
        return values

    def _draw(self) -> None:
        if self._drawn:
            return
        names = [name for name in self._curves or sorted(self.history) if name in self.history]
        common.save_curves(self.folder / "curves.png", {name: self.history[name] for name in names[:12]})
        self._drawn = True

    def __exit__(self, kind: type | None, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            # After an error of one process, the others may never come to the end of what they save together.
            if self._manager is not None and (kind in (None, SystemExit) or jax.process_count() == 1):
                self._settle()
                self._manager.close()
                self._manager = None
        except OSError as problem:
            if kind is None:
                raise
            if not issubclass(kind, OSError):  # which was that of `save`
                print(problem, file=sys.stderr)
        finally:
            self._close(failed=kind is not None)

    def _close(self, *, failed: bool) -> None:
        """Closes what is open and draws the curves; where the run failed already, a full disk is not said again."""
        try:
            if self._bar is not None:
                self._bar.close()
            if self._writes and self._lines is not None:
                self._lines.close()
                self._board.close()
                self._draw()
        except OSError:
            if not failed:
                raise
        finally:
            if self._lock is not None:
                self._lock.close()


def _is_state(tree: Any) -> bool:
    return isinstance(tree, train.TrainState)
