"""Several real processes on the CPU, joined by gloo: updates equal those of one device, a lost peer ends the others.

`python tests/processes_test.py MODE ...` is what they run; the tests here read what the first one saved.
"""

import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from filelock import FileLock
from problems import VOCAB, Result, assert_same, problems, three_updates, tiny

from alignax import advantages, distributed, models, sampling, sharding, train
from alignax.algorithms import grpo

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS, GROUP, WIDTH, NEW = 4, 4, 3, 5
# By the number of processes, which have four devices together: (problem, axes of the mesh).
MESHES = {
    2: [("sft", {"fsdp": 4}), ("dpo", {"data": 2, "tensor": 2}), ("sft", {}), ("loop", {"data": 4})],
    4: [("dpo", {"fsdp": 4}), ("loop", {"data": 2, "tensor": 2})],
}


def title(name, axes):
    return " ".join([name, *(f"{axis}={size}" for axis, size in axes.items())]) if axes else f"{name} pmap"


def on_mesh(mesh):
    """Parameters by the rules, rows over the row axes; every process has the batch whole."""
    compiled = []

    def place(tree):
        return sharding.place(tree, sharding.shardings(tree, mesh, models.RULES))

    def run(update, state, batch, frozen, hyper):
        compiled[:] = compiled or [jax.jit(update)]
        with jax.set_mesh(mesh):
            state, metrics = compiled[0](place(state), sharding.shard_batch(batch, mesh), place(frozen), hyper)
        kernel = state.params["layers"]["attn"]["q"]["kernel"]
        assert not kernel.is_fully_addressable
        assert kernel.addressable_data(0).size * mesh.size // mesh.shape.get("data", 1) == kernel.size
        trees = distributed.to_host((state.params, state.opt_state, metrics))
        return state._replace(params=trees[0], opt_state=trees[1]), trees[2]

    return run


def mapped():
    """jax.pmap over the devices of all processes, each with its own rows."""
    compiled = []

    def run(update, state, batch, frozen, hyper):
        compiled[:] = compiled or [jax.pmap(update, axis_name="device", in_axes=(0, 0, None, None))]
        count = jax.process_count()
        own = jax.tree.map(lambda x: np.split(x, count)[jax.process_index()], batch)
        rows = sharding.split_rows(own, jax.local_device_count())
        return sharding.unreplicate(compiled[0](sharding.replicate(state), rows, frozen, hyper))

    return run


def small_tokens(rows):
    """A reward of texts, such as they are here: the fraction of small tokens, [own]."""
    return (np.where(rows["mask"], rows["tokens"] < VOCAB // 2, 0).sum(1) / rows["mask"].sum(1)).astype(np.float32)


def asked(step):
    rng = np.random.default_rng(step)
    return rng.integers(0, VOCAB, (PROMPTS, WIDTH)).astype(np.int32), np.full(PROMPTS, WIDTH, np.int32)


def loop(mesh=None):
    """Two rollouts of GRPO with an SGD update each; without a mesh by plain code for one device."""
    (model, params), optimizer = tiny(), optax.sgd(0.5)
    sample = jax.jit(partial(sampling.generate, model, max_new_tokens=NEW, group=GROUP))
    update = train.make_update(grpo.make_loss(model, kl=None), optimizer)

    @jax.jit
    def learn(state, rows, reward):
        advantage = advantages.group_relative(reward.reshape(PROMPTS, GROUP)).ravel()
        return update(state, grpo.Batch(rows.tokens, rows.segments, rows.mask, advantage))

    state, rewards = train.TrainState.create(params, optimizer), []
    if mesh is not None:
        state = sharding.place(state, sharding.shardings(state, mesh, models.RULES))
    for step in range(2):
        given, key = asked(step), jax.random.key(step)
        if mesh is None:
            rows = sample(state.params, *given, key)
            reward = small_tokens({"tokens": np.asarray(rows.tokens), "mask": np.asarray(rows.mask)})
            state, _ = learn(state, rows, reward)
        else:
            with jax.set_mesh(mesh):
                rows = sample(state.params, *sharding.shard_batch(given, mesh), key)
                own = distributed.take_own_rows({"tokens": rows.tokens, "mask": rows.mask})
                assert len(own["tokens"]) < PROMPTS * GROUP
                reward = distributed.join_rows(small_tokens(own), rows.tokens)
                state, _ = learn(state, rows, sharding.shard_batch(reward, mesh))
        rewards.append(reward)
    return distributed.to_host(state.params), np.stack(rewards)


def exchange():
    """What `distributed` does with rows on a mesh whose tensor axis lies across the processes."""
    count = jax.process_count()
    devices = list(np.array(jax.devices()).reshape(count, -1).T.flat)  # neighbours are of different processes
    mesh = sharding.make_mesh(devices, data=len(devices) // 2, tensor=2)
    x = sharding.shard_batch(np.arange(24).reshape(12, 2), mesh)
    own = distributed.own_rows(x)
    assert (distributed.take_own_rows(x)[:, 0] == 2 * own).all()
    split = sharding.place(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "tensor")))
    assert (distributed.take_own_rows(split) == distributed.take_own_rows(x)).all()
    data = sharding.make_mesh(data=-1)
    mine = distributed.from_own_rows({"x": np.full((4, 2), jax.process_index())}, data)
    return {
        "owners": distributed.join_rows(np.full(len(own), jax.process_index()), x),
        "own": distributed.to_host(mine["x"]),
        "anywhere": np.array([distributed.anywhere(distributed.is_first()), distributed.anywhere(False)]),
    }


def compute(address, count, number, out):
    """All runs of so many processes; the first one saves what came out."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert distributed.initialise(address, int(count), int(number)) and len(jax.devices()) == 4
    arrays = {f"exchange/{name}": array for name, array in exchange().items()}
    for name, axes in MESHES[int(count)]:
        if name == "loop":
            result = loop(sharding.make_mesh(**axes))
        elif axes:
            result = three_updates(problems()[name], run=on_mesh(sharding.make_mesh(**axes)))
        else:
            result = three_updates(problems()[name], run=mapped(), axis_name="device")
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            arrays[title(name, axes) + jax.tree_util.keystr(path)] = leaf
    if distributed.is_first():
        np.savez(out, **arrays)


def lose(address, count, number, victim, how):
    """A script whose process `victim` ends after a while, killed or by an error, while the others compute or sleep."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import launch  # pyright: ignore[reportMissingImports]

    distributed.initialise = partial(distributed.initialise, heartbeat_seconds=5)
    config = launch.Options(coordinator=address, processes=int(count), process=int(number))

    @launch.on_mesh
    def main(config, mesh):
        x, total = sharding.shard_batch(np.ones(8, np.float32), mesh), jax.jit(jnp.sum)
        for step in range(10**9):
            print("total", float(total(x)), flush=step == 0)  # the collective
            if step == 5 and config.process == int(victim):
                if how == "fails":
                    raise ValueError("an error of its own")
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 5 and how == "sleeps":
                time.sleep(100)

    main(config)  # pyright: ignore[reportCallIssue]


def start(mode, count, devices, *args):
    """So many processes of this file."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT / "tests"),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    command = [sys.executable, __file__, mode, address, str(count)]
    out = {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, str(i), *map(str, args)], **out) for i in range(count)]


def ends(processes, seconds):
    """Exit code, stdout and stderr of each; what still runs after so long is killed, and the test fails."""
    deadline = time.monotonic() + seconds
    try:
        said = [process.communicate(timeout=max(1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said)]


@pytest.fixture(scope="module", params=MESHES)
def saved(request, tmp_path_factory):
    """The arrays that so many processes computed, by name: once for all workers."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"processes-{request.param}.npz"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            for code, _, error in ends(start("compute", request.param, 4 // request.param, out), 400):
                assert code == 0, error
    return request.param, dict(np.load(out))


@functools.cache
def alone(name):
    """The result of plain code on one device, in this process."""
    return loop() if name == "loop" else three_updates(problems()[name])


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
        before = tiny()[1]["head"]["kernel"]
        assert np.max(np.abs(expected[0]["head"]["kernel"] - before)) > 1e-3


def test_each_row_is_looked_after_by_one_process(saved):
    count, arrays = saved
    # Shares of six or three rows; each is held by two neighbours, who take turns.
    assert np.bincount(arrays["exchange/owners"]).tolist() == {2: [6, 6], 4: [6, 0, 0, 6]}[count]
    np.testing.assert_array_equal(arrays["exchange/own"][:, 0], np.repeat(np.arange(count), 4))
    assert arrays["exchange/anywhere"].tolist() == [True, False]


# The process that ends, how the others are met, and how it ends.
LOST = {"a worker": (1, "computes", -9), "the coordinator": (0, "sleeps", -9), "an error": (0, "fails", 1)}


def test_a_lost_peer_ends_the_others_within_a_minute():
    started = {name: start("lose", 2, 1, victim, how) for name, (victim, how, _) in LOST.items()}
    try:
        for name, (victim, how, code) in LOST.items():
            ((found, _, error),) = ends([started[name][victim]], 300)
            assert found == code, (name, error)
            assert ("an error of its own" in error) == (how == "fails")
            ((left, printed, error),) = ends([started[name][1 - victim]], 60)
            assert left == 76, (name, left, error[-3000:])
            where, what = (
                f"process {1 - victim} of 2: another process died, in processes_test.py line ",
                "float(total(x))",
            )
            assert where in error, (name, error[-3000:])
            assert ("time.sleep(100)" if how == "sleeps" else what) in error.partition(where)[2]
            assert "Start all processes again with --resume auto" in error
            assert ("total 8.0" in printed) == (victim == 1)  # of several processes only the first prints
    finally:
        for processes in started.values():
            for process in processes:
                process.kill()


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


if __name__ == "__main__":
    {"compute": compute, "lose": lose}[sys.argv[1]](*sys.argv[2:])
