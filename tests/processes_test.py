"""Several real processes on the CPU, joined by gloo: updates equal those of one device, a lost peer ends the others.

What they do is in processes_script.py; the tests here read what came out.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from filelock import FileLock
from problems import Result, assert_same, three_updates
from processes_script import LOOPS, LOST, MESHES, judged, loop, problem_of, title

from alignax import distributed, sharding

ROOT = pathlib.Path(__file__).parents[1]


def outcome(devices, *args):
    """What processes_script.py tells, whose processes have so many devices each."""
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in ("tests", "experiments")),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, ROOT / "tests" / "processes_script.py", *args]
    done = subprocess.run([str(x) for x in command], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=MESHES)
def saved(request, tmp_path_factory):
    """The arrays that so many processes computed, by name: once for all workers."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"processes-{request.param}.npz"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            for code, _, error in outcome(4 // request.param, "compute", request.param, out):
                assert code == 0, error
    return request.param, dict(np.load(out))


@functools.cache
def alone(name):
    """The result of plain code on one device, in this process."""
    return loop(name) if name in LOOPS else three_updates(problem_of(name))


def test_processes_equal_one_device(saved):
    count, arrays = saved
    for name, axes in MESHES[count]:
        expected, prefix = alone(name), title(name, axes)
        found = jax.tree_util.tree_map_with_path(lambda p, _, n=prefix: arrays[n + jax.tree_util.keystr(p)], expected)
        if isinstance(expected, Result):
            assert_same(found, expected)
            continue
        np.testing.assert_array_equal(found[1], expected[1])  # rewards, and with them all that was sampled
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), found[0], expected[0])
        before = LOOPS[name]()[1]["head"]["kernel"]
        assert np.max(np.abs(expected[0]["head"]["kernel"] - before)) > 1e-3


def test_each_row_is_looked_after_by_one_process(saved):
    count, arrays = saved
    # Shares of six or three rows; each is held by two neighbours, who take turns.
    assert np.bincount(arrays["exchange/owners"]).tolist() == {2: [6, 6], 4: [6, 0, 0, 6]}[count]
    np.testing.assert_array_equal(arrays["exchange/own"][:, 0], np.repeat(np.arange(count), 4))
    assert arrays["exchange/anywhere"].tolist() == [True, False]


def test_processes_judge_the_pairs_of_their_own_prompts(saved):
    _, arrays = saved
    for name, expected in judged().items():
        np.testing.assert_allclose(arrays[f"judged/{name}"], expected, rtol=1e-6, err_msg=name)


def test_a_lost_peer_ends_the_others_within_a_minute():
    for name, ((found, _, error), (left, printed, said)) in outcome(1, "lose").items():
        victim, how, code = LOST[name]
        assert found == code, (name, error)
        assert ("an error of its own" in error) == (how == "fails")
        assert left == 76, (name, left, said[-3000:])
        where = f"process {1 - victim} of 2: another process died, in processes_script.py line "
        assert where in said, (name, said[-3000:])
        assert ("time.sleep(100)" if how == "sleeps" else "float(total(x))") in said.partition(where)[2]
        assert "Start all processes again with --resume auto" in said
        assert ("total 8.0" in printed) == (victim == 1)  # of several processes only the first prints


def test_one_process_is_the_obvious_thing():
    assert not distributed.initialise() and distributed.is_first()
    rows = {"x": np.arange(6).reshape(3, 2)}
    x = sharding.shard_batch(rows, sharding.make_mesh(data=-1))["x"]
    np.testing.assert_array_equal(distributed.own_rows(x), [0, 1, 2])
    for found in (distributed.take_own_rows(x), distributed.join_rows(x, x), distributed.to_host(x)):
        assert isinstance(found, np.ndarray) and np.array_equal(found, rows["x"])
    np.testing.assert_array_equal(distributed.from_own_rows(rows, sharding.make_mesh(data=-1))["x"], rows["x"])
    assert distributed.anywhere(True) and not distributed.anywhere(False)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}
SLURM |= {"SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}


@pytest.mark.parametrize(
    "environment, given, expected",
    [
        (SLURM, (), (None, 8, 3)),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, (), None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, (), None),  # a batch script's own step
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.0.0.1:1"}, (), (None, 4, 2)),
        (OPEN_MPI, ("host:1",), ("host:1", 4, 2)),
        ({"JAX_COORDINATOR_ADDRESS": "host:1"}, (None, 2, 1), ("host:1", 2, 1)),
        ({}, ("host:1", 2, 0), ("host:1", 2, 0)),
        ({}, ("host:1", 1, 0), None),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "a,b"}, (), (None, None, None)),
        ({"JAX_PLATFORMS": "tpu", "TPU_WORKER_HOSTNAMES": "localhost"}, (), None),
        (OPEN_MPI, (), "Open MPI started 4 processes and does not say where the first one is"),
        ({}, ("host:1",), "coordinator=host:1 without processes and process; expected all three"),
        ({}, (None, 2), "processes=2 without coordinator and process"),
        ({}, ("host", 2, 0), "coordinator='host'; expected HOST:PORT"),
        ({}, ("host:65536", 2, 0), "coordinator='host:65536'; expected HOST:PORT"),
        ({}, ("host:1", 2, 2), "process=2 of processes=2; expected 0 to one less"),
    ],
)
def test_who_is_joined(monkeypatch, environment, given, expected):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: called.append(arguments))
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: True)  # libtpu
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "TPU_", "JAX_COORD"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected.replace("[", r"\[")):
            distributed.initialise(*given)
        return
    assert (
        distributed.initialise(*given, heartbeat_seconds=9, shutdown_seconds=8) is False
    )  # of this process nobody knows others
    names = ("coordinator_address", "num_processes", "process_id")
    assert [tuple(found.get(name) for name in names) for found in called] == ([] if expected is None else [expected])
    assert all(found["heartbeat_timeout_seconds"] == 9 and found["shutdown_timeout_seconds"] == 8 for found in called)
