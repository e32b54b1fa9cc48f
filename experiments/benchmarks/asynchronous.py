"""Times GRPO with devices that sample while others learn, against the same devices doing both in turn.

    python experiments/benchmarks/asynchronous.py --actors 4 --json asynchronous.json
    XLA_FLAGS=--xla_force_host_platform_device_count=4 python experiments/benchmarks/asynchronous.py   # on a CPU

A random Llama of 7.1 M parameters samples 8 prompts of 32 tokens, 4 completions of 32 each, is judged on the host and
makes one update, in three ways: all devices in turn; learner and actors apart, each waiting for the other; apart and
one rollout ahead. A line says for each how long a step took, how often the host waited for a device in it, and in how
many of the steps both sides were at work when the update had been started, the rollout of the next step among it.

What there is to win: one ahead, a step takes what the slower side takes, and not the sum of both, with half of the
devices for each. So it pays where a side does not get faster by more devices, as decoding does not. Simulated devices
share the same cores: they show the order of things and the bytes, and no gain.
"""

import argparse
import contextlib
import functools
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax
import timing
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from alignax import ahead, models, sampling, sharding, train
from alignax.algorithms import grpo

SHAPE = {"vocab": 8192, "width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 688}
TINY = {"vocab": 64, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 24}
WAYS = ("in turn", "apart", "one ahead")


def main(words: list[str] | None = None) -> None:
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("actors", len(jax.devices()) // 2, "devices that sample, of all"),
        ("prompts", 8, "prompts of a rollout"),
        ("group", 4, "completions of each"),
        ("prompt-length", 32, "tokens of a prompt"),
        ("new-tokens", 32, "tokens of a completion"),
        ("steps", 6, "steps of each way; the first two, with what they compile, do not count"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="which of them (default: all)")
    parser.add_argument("--judge-seconds", type=float, default=0.0, help="time that rewards take on the host")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, to try the program")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    args = parser.parse_args(words)
    if args.steps < 3:
        parser.error(f"--steps {args.steps}: the first two do not count, expected 3 or more")
    report = measure(args)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The three ways, one after the other."""
    together = sharding.make_mesh(data=-1)
    learners, actors = (sharding.make_mesh(devices, data=-1) for devices in ahead.split_devices(args.actors))
    model = timing.llama(TINY if args.tiny else SHAPE, max_positions=args.prompt_length + args.new_tokens)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where, there = (sharding.shardings(shapes, mesh, models.RULES) for mesh in (learners, actors))
    placed = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where)
    plan = ahead.plan_transfer(placed, there)
    ways = dict(zip(WAYS, ((together, together, 0), (learners, actors, 0), (learners, actors, 1))))
    return {
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "bytes": {"of weights": plan.size, "sent": plan.total, "to a device": max(plan.into.values())},
        "ways": {name: way(args, model, *ways[name]) for name in args.ways},
    }


def way(args: argparse.Namespace, model: Any, learners: Mesh, actors: Mesh, depth: int) -> dict[str, Any]:
    """One of them: what happened when, seconds after the start of each step."""
    optimizer, size = optax.adamw(1e-6), {"max_new_tokens": args.new_tokens, "group": args.group}
    sample = jax.jit(functools.partial(sampling.generate, model, **size))
    update = jax.jit(train.make_update(grpo.make_loss(model, kl=None), optimizer), donate_argnums=0)
    create = sharding.born_sharded(
        lambda key: train.TrainState.create(model.init(key), optimizer), learners, models.RULES
    )
    state = create(jax.random.key(0))
    where, apart = sharding.shardings(state.params, actors, models.RULES), learners is not actors
    rng, queue, waits = np.random.default_rng(0), ahead.Queue(), 0
    lengths = np.full(args.prompts, args.prompt_length, np.int32)

    def to_host(tree: Any) -> Any:
        nonlocal waits
        waits += 1
        return jax.device_get(tree)

    def start(weights: Any, number: int) -> sampling.Samples:
        prompts = rng.integers(0, 64, (args.prompts, args.prompt_length), dtype=np.int32)
        key = jax.device_put(jax.random.key(number), NamedSharding(actors, PartitionSpec()))
        with _ambient(actors):
            return sample(weights, *sharding.shard_batch((prompts, lengths), actors), key)

    steps = []
    for version in range(args.steps):
        begin, waits, events = time.perf_counter(), 0, {}

        def happened(name: str, begin: float = begin, events: dict[str, float] = events) -> None:
            events[name] = time.perf_counter() - begin

        weights = ahead.move(state.params, where) if apart else state.params
        queue, rollout = ahead.draw(queue, version, functools.partial(start, weights), ahead=depth, total=args.steps)
        happened("sampling started")
        batch = judged(args, to_host(rollout.value))
        happened("rollout judged")
        with _ambient(learners):
            state, metrics = update(state, sharding.shard_batch(batch, learners))
        happened("update started")
        busy = not state.step.is_ready() and any(not other.value.tokens.is_ready() for other in queue.waiting)
        to_host(metrics)
        happened("update done")
        steps.append({"events": events, "waits": waits, "both": busy, "staleness": version - rollout.version})
    counted = steps[2:]
    seconds = statistics.median(step["events"]["update done"] for step in counted)
    last = depth if depth < len(counted) else 0  # the last steps have no rollout to start
    both = [sum(step["both"] for step in counted), len(counted) - last]
    return {"seconds": seconds, "waits": counted[0]["waits"], "both": both, "steps": steps}


def judged(args: argparse.Namespace, rows: sampling.Samples) -> grpo.Batch:
    """A rollout's batch, by a reward that needs the tokens on the host."""
    time.sleep(args.judge_seconds)
    grouped = (rows.tokens % 2 * rows.mask).mean(axis=1).reshape(-1, args.group)
    advantages = (grouped - grouped.mean(axis=1, keepdims=True)).reshape(-1).astype(np.float32)
    return grpo.Batch(rows.tokens, rows.segments, rows.mask, advantages, old_logp=rows.logp)


def _ambient(mesh: Mesh) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def table(report: dict[str, Any]) -> str:
    """The report for the eye."""
    sizes = ", ".join(f"{value / 2**20:.1f} MiB {name}" for name, value in report["bytes"].items())
    lines = [f"{report['device']}, {report['arguments']['actors']} of them actors, jax {report['jax']}", sizes]
    lines.append("              s per step   host waits   steps with both at work")
    for name, found in report["ways"].items():
        both = "{} of {}".format(*found["both"])
        lines.append(f"{name:12}{found['seconds']:12.3f}{found['waits']:13d}   {both:>12}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
