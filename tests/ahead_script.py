"""Run by ahead_test.py in a process of four simulated devices: two learn and two sample. Prints JSON."""

import functools
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from problems import VOCAB, tiny

from alignax import ahead, distributed, losses, models, sampling, sharding, train
from alignax.algorithms import grpo
from alignax.io.digests import digests

ROWS, GROUP, WIDTH, NEW, STEPS = 4, 4, 3, 6, 5


def prompts(number):
    """Those of a rollout, and the key of its samples."""
    rng = np.random.default_rng(number)
    return (
        rng.integers(0, VOCAB, (ROWS, WIDTH)).astype(np.int32),
        np.full(ROWS, WIDTH, np.int32),
        jax.random.key(number),
    )


@functools.cache
def meshes():
    """That of the learners and that of the actors, which exist once the processes are joined."""
    return [sharding.make_mesh(devices, data=-1) for devices in ahead.split_devices(2)]


@functools.cache
def compiled():
    model, params = tiny()
    sample = jax.jit(partial(sampling.generate, model, max_new_tokens=NEW, group=GROUP))
    optimizer = optax.sgd(2.0)
    update = jax.jit(train.make_update(grpo.make_loss(model, policy_loss=losses.ppo_clip, kl=None), optimizer))
    state = train.TrainState.create(params, optimizer)
    return sample, update, jax.device_put(state, sharding.shardings(state, meshes()[0], models.RULES))


def start(mesh, weights, number):
    """Sampling on a mesh; a number, since a checkpoint holds no text."""
    *asked, key = prompts(number)
    with jax.set_mesh(mesh):
        sample, _, _ = compiled()
        return number, sample(
            weights, *sharding.shard_batch(asked, mesh), jax.device_put(key, NamedSharding(mesh, P()))
        )


def learn(state, rows):
    """One update from rows that are judged on the host: by the fraction of small tokens."""
    small = np.where(rows.mask, np.asarray(rows.tokens) < VOCAB // 2, 0).sum(1) / np.asarray(rows.lengths)
    grouped = small.reshape(ROWS, GROUP)
    advantages = (grouped - grouped.mean(1, keepdims=True)).reshape(-1).astype(np.float32)
    batch = grpo.Batch(rows.tokens, rows.segments, rows.mask, advantages, old_logp=rows.logp)
    learners, _ = meshes()
    with jax.set_mesh(learners):
        state, metrics = compiled()[1](state, sharding.shard_batch(batch, learners))
    return state, float(metrics["ratio/max"])


def plainly(lag):
    """The loop of one mesh that does all in turn, rollout k by the weights of `lag` updates before."""
    *_, state = compiled()
    versions, ratios = [state.params], []
    for number in range(STEPS):
        _, rows = start(meshes()[0], versions[max(0, number - lag)], number)
        state, ratio = learn(state, rows)
        versions.append(state.params)
        ratios.append(ratio)
    return versions[-1], ratios


def asynchronously(*, interrupted=False, **options):
    """The loop of the module's docstring; `interrupted`: all that it has goes through numpy after the second step."""
    *_, state = compiled()
    _, actors = meshes()
    where = sharding.shardings(state.params, actors, models.RULES)
    queue, used, ratios = ahead.Queue(), [], []
    for version in range(STEPS):
        weights = ahead.move(state.params, where)
        queue, rollout = ahead.draw(queue, version, partial(start, actors, weights), **options)
        used.append([rollout.value[0], rollout.version])
        state, ratio = learn(state, rollout.value[1])
        ratios.append(ratio)
        if interrupted and version == 1:
            kept = jax.tree.map(np.asarray, (state._replace(key=None), queue))  # a typed key is no numpy array
            state = jax.device_put(kept[0], jax.tree.map(lambda x: x.sharding, state._replace(key=None)))
            queue = jax.tree.map(lambda x: x if x.ndim else int(x), kept[1])
    return state.params, ratios, used, queue


def same(found, expected):
    return all(
        jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), found, expected))
    )


def of_bytes():
    """Plans beside the shards that arrive."""
    found, tree = {}, {"a": jnp.ones((8, 4)), "b": jnp.ones((6,), jnp.bfloat16), "c": jnp.ones(())}
    spread = {"a": P("x", None), "b": P("x"), "c": P()}
    first, last = (jax.sharding.Mesh(devices, ("x",)) for devices in ahead.split_devices(2))
    put = lambda mesh, specs: {name: NamedSharding(mesh, spec) for name, spec in specs.items()}  # noqa: E731
    tree = jax.device_put(tree, put(first, spread))
    for name, where in {
        "apart": put(last, {"a": P(None, "x"), "b": P(), "c": P()}),
        "same": put(first, spread),
        "turned": put(first, {"a": P(None, "x"), "b": P("x"), "c": P()}),
    }.items():
        plan, moved = ahead.plan_transfer(tree, where), ahead.move(tree, where)
        there = {device: 0 for device in plan.into}
        for shard in (shard for leaf in moved.values() for shard in leaf.addressable_shards):
            there[shard.device] += shard.data.nbytes
        found[name] = [plan.size, list(plan.into.values()), list(there.values()), same(moved, tree)]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    found["shapes"] = ahead.plan_transfer(shapes, put(first, spread)).total
    moved = ahead.move(tree, put(first, spread))
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(tree)
    found["stays"] = [all(x.is_deleted() for x in tree.values()), [float(x.max()) for x in moved.values()]]
    return found


def overlap():
    """An update that has ended while the actors are still at work: on half a second of it, behind their weights."""
    (learner, _), (actor, _) = ahead.split_devices(2)
    sample = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, y: y @ x, x))
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    weights = jax.device_put(jnp.zeros((512, 512)), learner)
    compiled = sample.lower(jax.device_put(weights, actor)).compile()
    queue, _ = ahead.draw(ahead.Queue(), 0, lambda _: jax.device_put(jnp.ones(()), actor))
    moved = ahead.move(weights, jax.sharding.SingleDeviceSharding(actor))
    queue, rollout = ahead.draw(queue, 1, lambda _: compiled(moved))
    (held,) = queue.waiting
    new = jax.block_until_ready(update(weights))
    early = [float(rollout.value), rollout.version, weights.is_deleted(), held.value.is_ready(), held.version]
    return early + [np.unique(new).tolist(), np.unique(held.value).tolist()]


def across():
    """Weights that go from two devices to two others, each pair over both processes; says what arrived."""
    first, last = (jax.sharding.Mesh(devices, ("x",)) for devices in ahead.split_devices(2))
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    where = {"split": P("x"), "whole": P(), "turned": P(None, "x")}
    split = sharding.place(x, NamedSharding(first, P("x")))
    with jax.set_mesh(first):  # as in a script
        moved = {name: ahead.move(split + 1, NamedSharding(last, spec)) for name, spec in where.items()}
    plan = {name: ahead.plan_transfer(split, NamedSharding(last, spec)) for name, spec in where.items()}
    return {
        "bytes": {name: list(found.into.values()) for name, found in plan.items()},
        "right": [
            np.array_equal(shard.data, x[shard.index] + 1)
            and shard.device in last.devices
            and len(leaf.sharding.device_set) == 2
            for leaf in moved.values()
            for shard in leaf.addressable_shards
        ],
        "doubled": float(jax.jit(jnp.sum)(2 * moved["split"])),
    }


def main():
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if len(sys.argv) > 1:
        distributed.initialise(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
        return print(json.dumps(across()))
    report = {"overlap": overlap(), "bytes": of_bytes()}
    parameters = {}
    for lag in (0, 1):
        expected, ratios = plainly(lag)
        found, off, used, queue = asynchronously(ahead=lag, total=STEPS)
        parameters[lag], left = found, len(queue.waiting)
        report[str(lag)] = {"bits": same(found, expected), "used": used, "ratios": [ratios, off], "left": left}
    learners, actors = meshes()
    large = np.arange(2**17, dtype=np.int32).reshape(-1, 4)
    with jax.set_mesh(learners):
        report["digests"] = [digests({"x": x}) for x in (large, sharding.shard_batch(large, actors))]
    report["differ"] = not same(*parameters.values())
    report["resumed"] = same(asynchronously(ahead=1, total=STEPS, interrupted=True)[0], parameters[1])
    _, _, used, queue = asynchronously(ahead=2, max_staleness=1)
    report["bounded"] = [used, queue.started, queue.dropped]
    return print(json.dumps(report))


if __name__ == "__main__":
    main()
