"""Endurance: runs that are killed, starved and corrupted, and go on to the same bits. One command, one table.

    python experiments/endurance.py --output runs/endurance
    python experiments/endurance.py --output runs/endurance --trials killed --cases sft grpo --kills 20

Each trial runs scripts on a tiny random model, in processes that are struck at moments which follow from the seed, and
compares what they leave with what the same run leaves alone: every byte of the model, metrics, curves and rollouts;
and what two processes leave with what one leaves. Results in the output folder: endurance.md, one line a trial, and
logs/ with what every process said.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "experiments"), str(ROOT)]

import big_folder  # noqa: E402
import common  # noqa: E402
import pairs  # noqa: E402
import restarts  # noqa: E402
import trials  # noqa: E402
import tyro  # noqa: E402


def on_meshes(work: trials.Work, algorithm: str) -> str:
    """An algorithm on every mesh of eight simulated devices: see meshes.py."""
    output = work.folder / "runs" / f"meshes-{algorithm}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    options = {"output": output, "algorithms": (algorithm,), **work.options}
    restarts.finish(restarts.Job("meshes", options, {"XLA_FLAGS": flags}), output.with_suffix(".log"), seconds=10_000)
    found = json.loads(output.read_text())
    assert not found["failed"], found["failed"]
    held = ", ".join(f"{size} of {n}" for n, size in sorted(found["bytes"].items(), key=lambda item: int(item[0])))
    return f"{found['meshes']} meshes, losses within {found['apart']:.0e}; state's bytes of a device: {held}"


def big(work: trials.Work, source: Any) -> str:
    """A model larger than half of what a process may take, loaded onto a mesh."""
    del work
    return big_folder.main(big_folder.Config(sources=(source,)))[0]


PROBLEMS = ("sft", "dpo", "kto", "reward_model", "grpo", "dapo", "ppo", "ppo_critic", "ppo_shared")  # tests/problems.py
FIRST = ("sft", "dpo", "reward_model", "kto", "grpo", "ppo", "online dpo")  # one of each script
TRIALS: dict[str, tuple[Callable[[trials.Work, str], str], tuple[str, ...]]] = {
    "killed": (trials.killed, tuple(trials.CASES)),
    "terminated": (trials.terminated, FIRST),
    "repeated": (trials.repeated, FIRST),
    "damaged": (trials.damaged, ("sft",)),
    "starved": (trials.starved, ("sft",)),
    "occupied": (trials.occupied, ("sft",)),
    "bereaved": (pairs.bereaved, ("sft", "dpo", "grpo")),
    "together": (pairs.together, (*FIRST, "nash_ema", "sppo")),  # whose preferences are known in two ways
    "meshes": (on_meshes, (*PROBLEMS, "mixture")),
    "big": (big, ("folder", "checkpoint")),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried."""

    output: pathlib.Path
    """New folder for everything that comes out."""
    trials: tuple[str, ...] = tuple(TRIALS)
    """Which trials."""
    cases: tuple[str, ...] = ()
    """Only these cases of the trials; each has its own, see `TRIALS`."""
    kills: int = 20
    """Kills of each run that is killed."""
    seed: int = 0
    """Of the moments at which runs are struck."""


def attempt(work: trials.Work, trial: str, case: str) -> dict[str, Any]:
    """One row of the table."""
    began = time.monotonic()
    try:
        found, held = TRIALS[trial][0](work, case), "held"
    except PermissionError as error:
        found, held = str(error), "skipped"
    except Exception as error:
        traceback.print_exc()
        found, held = str(error).splitlines()[0][:200], "FAILED"
    return {"trial": trial, "case": case, "result": held, "seen": found, "seconds": round(time.monotonic() - began)}


def main(config: Config) -> None:
    """Runs the trials and prints the table; exits with 1 when one failed."""
    known = {case for _, cases in TRIALS.values() for case in cases}
    if unknown := {*config.trials} - TRIALS.keys() or {*config.cases} - known:
        raise ValueError(f"unknown {sorted(unknown)}; expected trials of {list(TRIALS)}, cases of {sorted(known)}")
    work = trials.Work(config.output.absolute(), config.seed, config.kills)
    trials.write_inputs(work.folder / "inputs")
    restarts.prepare(work.folder / "cache")
    print(f"seed {config.seed}")
    rows = []
    for trial in config.trials:
        for case in TRIALS[trial][1]:
            if case in (config.cases or known):
                rows.append(attempt(work, trial, case))
                print(" | ".join(str(cell) for cell in rows[-1].values()), flush=True)
    table = common.table(rows)
    print(table)
    (work.folder / "endurance.md").write_text(f"seed {config.seed}\n\n{table}\n")
    if any(row["result"] == "FAILED" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
