"""One case of each proof of experiments/endurance.py: a run struck again and again leaves what one alone leaves."""

import json
import os
import pathlib
import signal

import endurance
import jax
import pytest
import restarts
import running
import trials

SMALL = {"steps": 12, "evaluate_every": 3, "batch_size": 4, "lora_rank": 2, "lora_dropout": 0.2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endurance")
    trials.write_inputs(folder / "inputs")
    restarts.prepare(pathlib.Path(jax.config.jax_compilation_cache_dir))
    return trials.Work(folder, options=SMALL)


def test_a_run_that_is_struck_leaves_what_one_alone_leaves(work):
    alone, job = work.job("sft", "alone"), work.job("sft", "struck")
    work.finish(alone)

    killed = work.start(job)
    assert killed.until(lambda: restarts.lines(job.output) > 5 and trials.saving(job.output))  # in a save
    killed.kill()
    assert killed.code == -signal.SIGKILL

    before, step = trials.stamp(job.output), trials.newest(job.output)
    told = work.start(job)
    assert told.until(lambda: trials.stamp(job.output) != before and restarts.lines(job.output) > step + 1)
    os.kill(told.process.pid, signal.SIGSTOP)  # in a step of its own; it does not run ahead while another one asks
    second = work.start(job)
    assert second.wait() == 1 and "is in use by" in second.said()
    os.kill(told.process.pid, signal.SIGTERM)
    os.kill(told.process.pid, signal.SIGCONT)
    assert told.wait() == running.PREEMPTED
    *_, older, newest = trials.saved(job.output)
    assert newest == restarts.lines(job.output) - 1 < SMALL["steps"]

    trials.damage(trials.numbers(job.output, newest), "one bit changed")
    said = work.finish(job).said()
    assert "CHECKPOINT DAMAGED" in said and f"goes on from step {older}" in said
    assert restarts.differences(alone.output, job.output) == []
    assert len((job.output / "metrics.jsonl").read_text().splitlines()) == SMALL["steps"] + 1


def test_another_seed_on_a_full_disk(work):
    """Without room it ends, with room it goes on; the bits are others than those of the seed above."""
    disk, alone = work.folder / "disk", work.job("sft", "alone")
    try:
        with trials.small_disk(disk):
            job = work.job("sft", "starved", seed=1).into(disk / "run")
            starved = work.start(job)
            assert starved.until(lambda: len(trials.saved(job.output)) > 1)
            code, step = trials.starve(starved, disk)
            assert code == 1 and step in trials.saved(job.output)
            assert f"goes on from step {step}" in work.finish(job).said()
            found = restarts.differences(alone.output, job.output)
    except PermissionError as error:
        pytest.skip(str(error))
    assert {"metrics.jsonl", "model/model.safetensors"} <= {*found}


def test_meshes(work):
    """Three of the twenty with eight devices; tokens over some of them, too."""
    small = trials.Work(work.folder, options={"sizes": (8,), "every": 7})
    said = endurance.on_meshes(small, "sft")
    assert said.startswith("3 meshes, losses within ")
    assert json.loads((work.folder / "runs" / "meshes-sft.json").read_text())["apart"] < 1e-5
