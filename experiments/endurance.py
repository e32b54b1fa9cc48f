"""Endurance: runs that are killed, starved and corrupted, and go on to the same bits. One command, one table.

    python experiments/endurance.py --output runs/endurance
    python experiments/endurance.py --output runs/endurance --trials killed --cases sft grpo --kills 20

Each trial runs scripts on a tiny random model, in processes that are struck at moments which follow from the seed, and
compares what they leave with what the same run leaves alone: every byte of the model, metrics, curves and rollouts.
Results in the output folder: endurance.md, one line a trial, and logs/ with what every process said.
"""

import dataclasses
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "experiments")]

import common  # noqa: E402
import restarts  # noqa: E402
import trials  # noqa: E402
import tyro  # noqa: E402

FIRST = ("sft", "dpo", "reward_model", "kto", "grpo", "ppo", "online dpo")  # one of each script
TRIALS: dict[str, tuple[Callable[[trials.Work, str], str], tuple[str, ...]]] = {
    "killed": (trials.killed, tuple(trials.CASES)),
    "terminated": (trials.terminated, FIRST),
    "repeated": (trials.repeated, FIRST),
    "damaged": (trials.damaged, ("sft",)),
    "starved": (trials.starved, ("sft",)),
    "occupied": (trials.occupied, ("sft",)),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is tried."""

    output: pathlib.Path
    """New folder for everything that comes out."""
    trials: tuple[str, ...] = tuple(TRIALS)
    """Which trials."""
    cases: tuple[str, ...] = ()
    """Only these cases, where a trial has them."""
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
    if unknown := {*config.trials} - TRIALS.keys() or {*config.cases} - trials.CASES.keys():
        raise ValueError(f"unknown {sorted(unknown)}; expected trials of {list(TRIALS)}, cases of {list(trials.CASES)}")
    work = trials.Work(config.output.absolute(), config.seed, config.kills)
    trials.write_inputs(work.folder / "inputs")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:2], str(ROOT), os.environ.get("PYTHONPATH", "")])
    restarts.prepare(work.folder / "cache")
    print(f"seed {config.seed}")
    rows = []
    for trial in config.trials:
        for case in TRIALS[trial][1]:
            if case in (config.cases or trials.CASES):
                rows.append(attempt(work, trial, case))
                print(" | ".join(str(cell) for cell in rows[-1].values()), flush=True)
    table = common.table(rows)
    print(table)
    (work.folder / "endurance.md").write_text(f"seed {config.seed}\n\n{table}\n")
    if any(row["result"] == "FAILED" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Config))
