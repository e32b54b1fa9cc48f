"""Run by processes_test.py: several real processes on the CPU, joined by gloo, forked from one that imported all once.

`python processes_script.py compute COUNT OUT` updates on so many processes, which have four devices together, and the
first one saves what came out; `python processes_script.py lose` ends one of two processes, each way of `LOST`. Prints
JSON: exit code, stdout and stderr of every process.
"""

import json
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import tempfile
import time
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from problems import VOCAB, problems, small, three_updates, tiny

from alignax import advantages, distributed, models, sampling, sharding, train
from alignax.algorithms import grpo

PROMPTS, GROUP, WIDTH, NEW = 4, 4, 3, 5
LOOPS = {"grpo": small, "grpo of a transformer": tiny}
# By the number of processes: (problem, axes of the mesh).
MESHES = {
    2: [("sft", {"fsdp": 4}), ("sft", {}), ("dpo", {"fsdp": 4}), ("grpo of a transformer", {"fsdp": 2, "tensor": 2})],
    4: [("sft", {"fsdp": 4}), ("dpo of a transformer", {"data": 2, "tensor": 2}), ("grpo", {"data": 4})],
}
# The process that ends, how the others are met, and how it ends.
LOST = {"a worker": (1, "computes", -9), "the coordinator": (0, "sleeps", -9), "an error": (0, "fails", 1)}


def problem_of(name):
    """A problem, of the smallest network unless its name says otherwise."""
    name, transformer, _ = name.partition(" of a transformer")
    return problems(tiny if transformer else small)[name]


def title(name, axes):
    return " ".join([name, *(f"{axis}={size}" for axis, size in axes.items())]) if axes else f"{name} pmap"


def make_mesh(axes):
    """A mesh whose last axis lies across the processes: neighbours are of different ones."""
    devices = list(np.array(jax.devices()).reshape(jax.process_count(), -1).T.flat)
    return sharding.make_mesh(devices, **axes)


def on_mesh(mesh):
    """Parameters by the rules, rows over the row axes; every process has the batch whole."""
    compiled = []

    def place(tree):
        return sharding.place(tree, sharding.shardings(tree, mesh, models.RULES))

    def run(update, state, batch, frozen, hyper):
        compiled[:] = compiled or [jax.jit(update)]
        with jax.set_mesh(mesh):
            state, metrics = compiled[0](place(state), sharding.shard_batch(batch, mesh), place(frozen), hyper)
        kernel = (state.params["layers"]["attn"]["q"] if "layers" in state.params else state.params["up"])["kernel"]
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


def loop(name, mesh=None):
    """Two rollouts of GRPO with an SGD update each; without a mesh by plain code for one device."""
    (model, params), optimizer = LOOPS[name](), optax.sgd(0.5)
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
    mesh = make_mesh({"data": 2, "tensor": 2})
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


class Letters:
    """As much of a tokenizer as decoding needs: 0 is a, and so on."""

    all_special_ids = ()

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def judged(mesh=None):
    """Pairs of completions of prompts that processes share, by a preference function; without a mesh by one process."""
    import duels

    rng, shape = np.random.default_rng(5), (8, 2, 7)
    tokens, mask = (
        rng.integers(0, 26, shape).astype(np.int32),
        np.arange(7) >= np.array([3, 4]).repeat(4)[:, None, None],
    )
    mask, cut = np.broadcast_to(mask, shape), rng.random(shape[:2]) < 0.5
    samples = sampling.Samples(tokens, 1 + 0 * tokens, mask, 0.0 * tokens, mask.sum(-1), cut, 0.0 * tokens)
    samples = samples if mesh is None else sharding.shard_batch(samples, mesh)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "mine.py"
        file.write_text(
            "def first(prompts, first, second, **_):\n"
            "    return [0.5 + 0.05 * (1 + int(p)) * ((a < b) - (a > b)) for p, a, b in zip(prompts, first, second)]\n"
        )
        config = types.SimpleNamespace(prefer=f"{file}:first", reward="", missing_eos_penalty=1.0)
        judge = duels.make_judge(config, types.SimpleNamespace(tokenizer=Letters(), eos_ids=()))
        asked = {"prompts": [str(i) for i in range(8)], "columns": [{} for _ in range(8)]}
        verdict = judge(asked, samples)
    assert len(verdict.completions) == (8 if mesh is None else 8 // jax.process_count())
    said = duels.describe(samples, verdict, np.arange(8) != 3)
    batch = jax.tree.map(distributed.to_host, duels.chosen((samples.tokens,), np.array([[1, 0]] * 8)))
    return {"preferences": verdict.preferences, "tokens": batch[0]} | {n: np.asarray(x) for n, x in said.items()}


def compute(address, count, number, out):
    """All runs of so many processes; the first one saves what came out."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert distributed.initialise(address, count, number) and len(jax.devices()) == 4
    arrays = {f"exchange/{name}": array for name, array in exchange().items()}
    for name, axes in MESHES[count]:
        if name in LOOPS:
            result = loop(name, make_mesh(axes))
        elif axes:
            result = three_updates(problem_of(name), run=on_mesh(make_mesh(axes)))
        else:
            result = three_updates(problem_of(name), run=mapped(), axis_name="device")
        for path, leaf in jax.tree_util.tree_leaves_with_path(result):
            arrays[title(name, axes) + jax.tree_util.keystr(path)] = leaf
    arrays |= {f"judged/{name}": array for name, array in judged(make_mesh({"data": 4})).items()}
    if distributed.is_first():
        np.savez(out, **arrays)
    jax.distributed.shutdown()  # which a process that was forked would not come to: all wait for the last


def lose(address, count, number, victim, how):
    """A script whose process `victim` ends after a while, killed or by an error, while the others compute or sleep."""
    import launch

    distributed.initialise = partial(distributed.initialise, heartbeat_seconds=5)
    config = launch.Options(coordinator=address, processes=count, process=number)

    @launch.on_mesh
    def main(config, mesh):
        x, total = sharding.shard_batch(np.ones(8, np.float32), mesh), jax.jit(jnp.sum)
        for step in range(10**9):
            print("total", float(total(x)), flush=step == 0)  # the collective
            if step == 5 and number == victim:
                if how == "fails":
                    raise ValueError("an error of its own")
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 5 and how == "sleeps":
                time.sleep(100)

    main(config)  # pyright: ignore[reportCallIssue]


def start(folder, work, count, *args):
    """So many processes of `work(address, count, number, *args)`; what each says goes to files of its own."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    fork = multiprocessing.get_context("fork")  # of a process in which JAX has not asked for devices yet
    said = [pathlib.Path(tempfile.mkdtemp(dir=folder)) for _ in range(count)]
    found = [
        fork.Process(target=live, args=(said[i], work, address, count, i, *args), daemon=True) for i in range(count)
    ]
    for process in found:
        process.start()
    return list(zip(found, said))


def live(said, work, *args):
    """What a process does."""
    for number, name in ((1, "out"), (2, "error")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT), number)
    work(*args)


def ends(process, said, seconds):
    """Exit code, stdout and stderr of a process, which is killed when it still runs after so long."""
    process.join(seconds)
    code = process.exitcode
    process.kill()
    return code, *((said / name).read_text() for name in ("out", "error"))


def main(mode, *args):
    """Starts the processes, and tells how they ended."""
    with tempfile.TemporaryDirectory() as folder:
        if mode == "compute":
            deadline = time.monotonic() + 400
            started = start(folder, compute, int(args[0]), args[1])
            return [ends(*process, max(1, deadline - time.monotonic())) for process in started]
        import launch  # noqa: F401  once for all

        started = {name: start(folder, lose, 2, victim, how) for name, (victim, how, _) in LOST.items()}
        return {
            name: (ends(*started[name][victim], 300), ends(*started[name][1 - victim], 60))
            for name, (victim, *_) in LOST.items()
        }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
