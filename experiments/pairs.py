"""Trials of two processes that compute together: they leave what one leaves, and when one dies, so does the other."""

import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import restarts
import survivors
import trials
from restarts import Life
from safetensors.numpy import load_file

from alignax import data

FEW = {"steps": 4, "evaluate_every": 2, "learning_rate": 1e-3}  # of `together`


def bereaved(work: trials.Work, case: str) -> str:
    """Of two processes one is killed: the other ends within a minute with 76; then both, to the end."""
    alone, rng = pair(work, case, "two, alone"), work.rng(case, "bereaved")
    for life in alone:
        assert life.wait() == 0, life.said()[-4000:]
    lives = pair(work, case, "two, killed")
    folder, step, victim = lives[0].job.output, int(rng.integers(3, 10)), int(rng.integers(2))
    assert lives[victim].until(lambda: restarts.lines(folder) > step), lives[0].said()[-4000:]
    lives[victim].kill()
    began = time.monotonic()
    code = lives[1 - victim].wait(60)
    seconds, said = time.monotonic() - began, lives[1 - victim].said()
    assert code == survivors.PEER_LOST and "another process died" in said, f"ended with {code}:\n{said[-4000:]}"
    for life in pair(work, case, "two, killed"):
        assert life.wait() == 0, life.said()[-4000:]
    found = restarts.differences(alone[0].job.output, folder)
    assert not found, f"{folder} differs from the run of two processes left alone in {found}"
    return f"process {victim} killed at step {step}; the other: exit {code} after {seconds:.0f} s"


def pair(work: trials.Work, case: str, name: str, **options: Any) -> list[Life]:
    """A run as two processes, started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    options |= {"coordinator": where, "processes": 2}
    return [work.start(work.job(case, name, **options, process=number)) for number in range(2)]


def together(work: trials.Work, case: str) -> str:
    """Two processes leave, byte for byte, what one with two devices leaves, and close to it what a single device does.

    Close is: where rollouts are saved, the same tokens were sampled; metrics agree to 1e-4 of each and 1e-5, and models
    to 1e-4 of how far they moved from the start, as norms over all parameters. Not entry by entry, since AdamW divides
    a gradient by its own size: where that is nothing but rounding, a parameter may go the other way, by as much as any.
    """
    lives = pair(work, case, "together", **FEW)
    for life in lives:
        assert life.wait() == 0, life.said()[-4000:]
    several, said = lives[0].job.output, []
    for count in (2, 1):
        job = work.job(case, f"together, devices {count}", **FEW)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
        work.finish(job._replace(environment={"XLA_FLAGS": flags}))
        if count == 2:
            found = restarts.differences(job.output, several)
            assert not found, f"{several} differs from the run of one process with two devices in {found}"
        else:
            said = [apart_in_metrics(job.output, several), *apart_in_models(work, job.output, several)]
            rollouts = [sorted(path.glob("rollouts/*.parquet")) for path in (job.output, several)]
            for left, right in zip(*rollouts, strict=True):
                found = data.rollouts.read(left).tokens, data.rollouts.read(right).tokens
                assert np.array_equal(*found), f"{right}: other tokens than of one device"
    return f"as one process with two devices; one device: {', '.join(said)}"


def apart_in_metrics(left: pathlib.Path, right: pathlib.Path) -> str:
    """How far the metrics of two runs are apart, and which are farthest; more than `together` grants is an error."""
    lines = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (left, right)]
    assert [list(line) for line in lines[0]] == [list(line) for line in lines[1]], "other metrics"
    far, name, *values = max(
        (abs(line[name] - other[name]) / (1e-5 + 1e-4 * abs(line[name])), name, line[name], other[name])
        for line, other in zip(*lines)
        for name in line
    )
    assert far < 1, f"{name}: {values}"
    return f"{name} apart by {far:.1g} of what is granted"


def apart_in_models(work: trials.Work, left: pathlib.Path, right: pathlib.Path) -> Iterator[str]:
    """How far each saved model of two runs is apart, of how far it moved; more than `together` grants is an error."""
    start = load_file(work.folder / "inputs" / "model" / "model.safetensors")
    assert (left / "model" / "model.safetensors").exists(), f"{left}: no model"
    for path in sorted(left.glob("*/*.safetensors")):
        models = load_file(path), load_file(right / path.relative_to(left))
        moved = math.hypot(*(np.linalg.norm(x - start[name]) for name, x in models[0].items() if name in start))
        apart = math.hypot(*(np.linalg.norm(x - models[1][name]) for name, x in models[0].items()))
        assert apart < 1e-4 * moved, f"{path.parent.name}: moved {moved}, apart {apart}"
        yield f"{path.parent.name} apart by {apart / moved:.0e} of its way"
