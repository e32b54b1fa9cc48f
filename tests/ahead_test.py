"""Rollouts ahead of updates: on two meshes against a plain loop on one, and the order of what is started."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import ahead


def started(devices, *words):
    """The script in a process of so many devices."""
    script = pathlib.Path(__file__).with_name("ahead_script.py")
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script), *map(str, words)], env=environment, **pipes)


def said(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def report():
    """One process of four devices serves all tests but one."""
    return said(started(4))


def test_weights_stay_in_their_process():
    """Two processes, of two devices each one that learns and one that samples. x is float32 [6, 2]: 48 bytes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for found in [said(process) for process in [started(2, port, number) for number in (0, 1)]]:
        assert found["bytes"] == {"split": [24, 24], "whole": [48, 48], "turned": [24, 24]}
        assert found["right"] == [True] * 3  # a shard of each on this process's actor
        assert found["doubled"] == 2 * (66 + 12)


def test_with_the_newest_weights_it_is_the_synchronous_loop_to_the_bit(report):
    found = report["0"]
    assert found["bits"] and found["used"] == [[k, k] for k in range(5)] and found["left"] == 0
    np.testing.assert_allclose(found["ratios"], 1, atol=1e-5)  # every rollout is on-policy


def test_one_step_off_it_is_the_loop_that_samples_with_the_weights_before(report):
    found = report["1"]
    assert found["bits"] and found["used"] == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 3]] and found["left"] == 0
    plain, off = found["ratios"]
    assert (
        off == plain and abs(off[0] - 1) < 1e-5 and min(off[1:]) > 1.01
    )  # by the sampler's weights, no longer its own
    assert report["differ"]


def test_what_is_under_way_survives_a_checkpoint(report):
    """State and queue through numpy after the second step give the parameters of the run that went on."""
    assert report["resumed"]
    host, device = report["digests"]  # of what lies on the actors' mesh while the learner's is in effect
    assert device == host


def test_a_bound_drops_what_is_too_old(report):
    """Two ahead, at most one behind. Of the first three only two are fresh enough; later every third is not."""
    used, started, dropped = report["bounded"]
    assert used == [[0, 0], [1, 0], [3, 1], [4, 2], [6, 3]] and (started, dropped) == (9, 2)


def test_an_update_ends_while_the_actors_work(report):
    rollout, version, donated, done, held_version, new, held = report["overlap"]
    assert (rollout, version) == (1.0, 0) and held_version == 1
    assert donated and not done  # and the copy of the weights that they use is none of the donated ones
    assert new == [1.0] and held == [0.0]


def test_bytes_are_told_before_they_move(report):
    """a float32 [8, 4], b bfloat16 [6], c float32 []: 128 + 12 + 4 bytes, on two devices each."""
    found = report["bytes"]
    whole, halves = 128 // 2 + 12 + 4, 128 // 2 + 12 // 2 + 4
    assert found["apart"] == [144, [whole, whole], [whole, whole], True]  # half of a, all of b and c
    assert found["same"] == [144, [0, 0], [halves, halves], True]
    assert found["turned"] == [144, [32, 32], [halves, halves], True]  # a quarter of a, the other is there
    assert found["shapes"] == 2 * halves  # of shapes that lie nowhere all of it moves
    assert found["stays"] == [True, [1, 1, 1]]  # on the same devices too, where the originals were donated


def test_what_is_started_and_when():
    """Two ahead of six: a list of events, beside the order they must have."""
    events, queue = [], ahead.Queue()

    def start(version, number):
        events.append(f"start {number} by {version}")

    for version in range(6):
        queue, rollout = ahead.draw(queue, version, partial(start, version), ahead=2, total=6)
        events.append(f"learn from {rollout.version}")
    firsts = ["start 0 by 0", "start 1 by 0", "start 2 by 0", "learn from 0"]
    middle = ["start 3 by 1", "learn from 0", "start 4 by 2", "learn from 0", "start 5 by 3", "learn from 1"]
    assert events == firsts + middle + ["learn from 2", "learn from 3"]
    assert queue == ahead.Queue((), 6, 0)
    with pytest.raises(ValueError, match=r"total=6 rollouts were drawn"):
        ahead.draw(queue, 6, partial(start, 6), total=6)


def test_dropped_rollouts_are_made_up_for_at_the_end():
    queue = ahead.Queue((ahead.Stamped(0, "old"),), 3, 0)
    queue, rollout = ahead.draw(queue, 5, str, max_staleness=4, total=3)
    assert (queue, rollout) == (ahead.Queue((), 4, 1), (5, "3"))


def test_rows_of_several_versions():
    found = jax.jit(ahead.fresh)(jnp.array([3, 5, 4, 7]), 7, max_staleness=3)
    np.testing.assert_array_equal(found, [0, 1, 1, 1])


class Device:
    def __init__(self, name, process_index):
        self.name, self.process_index = name, process_index


def test_devices_of_each_process():
    devices = [Device(f"{process}{index}", process) for process in (0, 1) for index in range(3)]
    learner, actors = ahead.split_devices(2, devices)
    assert [x.name for x in learner] == ["00", "01", "10", "11"] and [x.name for x in actors] == ["02", "12"]
    for count in (0, 1, 6):
        with pytest.raises(ValueError, match=rf"actors={count} for 2 processes of at least 3 devices"):
            ahead.split_devices(count, devices)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ahead": -1}, "ahead=-1; expected 0 or more"),
        ({"max_staleness": -1}, "max_staleness=-1; expected 0 or more"),
        ({"version": 1}, "version=1 after 2; expected one that never falls"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    queue = ahead.Queue((ahead.Stamped(2, None),), 1, 0)
    with pytest.raises(ValueError, match=message):
        ahead.draw(queue, **{"version": 2, "sample": str, **options})
