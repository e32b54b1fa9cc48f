"""Where rollouts are sampled: on the devices that learn, in turn with that, or on devices of their own, ahead of it.

    python experiments/grpo.py ... --actors 4 --correction truncated_is_token

samples on the last four devices while the others learn from the rollout before: see `alignax.ahead`. Such a rollout is
by weights one update older than those that learn from it. Without a correction the policy loss takes its ratio to them
(`old_logp` is the sampler's); with one it clips around the newest weights, and the correction weighs by the ratio.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import adapters
import checks
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rollouts import Prompts, Sampler

from alignax import ahead, models, sampling, sharding
from alignax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Devices that sample: fields of a Config."""

    actors: int = 0
    """Devices that sample while the others learn; 0: all of them do both, in turn."""
    staleness: int = 1
    """With actors: rollouts that are sampled ahead of the one that is learned from, by weights so many rollouts older;
    0 waits for the newest weights."""
    max_staleness: int | None = None
    """With actors: leave out rollouts by weights more rollouts older than this, and sample others; None: none."""


def check(config: Any) -> None:
    """Refuses what does not fit together.

    Raises:
      ValueError: for numbers out of range, options of actors that there are not, devices that do not divide, and a
        policy loss that knows no ratio where nothing else makes up for older weights.
    """
    checks.check_ranges(config, least={"actors": 0, "staleness": 0, "max_staleness": 0})
    if not config.actors:
        given = [field.name for field in dataclasses.fields(Options) if getattr(config, field.name) != field.default]
        if given:
            raise ValueError(f"{given} with actors=0, which samples by the newest weights; expected 1 actor or more")
        return
    split = config.tensor * config.expert
    if config.actors % split:
        raise ValueError(f"actors={config.actors} with tensor * expert = {split}; expected a multiple of that")
    if config.prompts % (count := sharding.row_devices(_mesh(config))):
        raise ValueError(f"prompts={config.prompts} do not divide among {count} actors that take rows each")
    if config.staleness and config.policy_loss == "reinforce" and config.correction == "none":
        raise ValueError(
            f"--policy-loss reinforce with staleness={config.staleness}: it knows no ratio to the policy that sampled; "
            "expected reinforce_is_token, or a correction"
        )


def learners(config: Any) -> list[Any]:
    """The devices that learn: all but the actors, if a Config has any."""
    actors = getattr(config, "actors", 0)
    return ahead.split_devices(actors)[0] if actors else jax.devices()


class Stage(NamedTuple):
    """Where rollouts are sampled."""

    mesh: Mesh
    publish: Callable[[Params], Params]  # the weights to sample with there, of what is trained
    size: int  # bytes that this sends
    empty: sampling.Samples | None  # rows of no rollout; None where none is ever under way


def make_stage(
    config: Any, sampler: Sampler, trained: adapters.Adapters, params: Params, prompts: Prompts, mesh: Mesh
) -> Stage:
    """The learner's mesh, where there are no actors; otherwise theirs, to which only what is trained is sent."""
    if not config.actors:
        return Stage(mesh, trained.whole, 0, None)
    there = _mesh(config)
    where = sharding.shardings(params, there, models.RULES)
    if trained.base is not None:
        trained = trained._replace(base=ahead.move(trained.base, sharding.shardings(trained.base, there, models.RULES)))
    cast = jax.jit(sampling.rollout_params) if config.rollout_bfloat16 else lambda params: params
    plan = ahead.plan_transfer(_like(jax.eval_shape(cast, params), params), where)
    print(
        f"actors: {there.size} devices sample, {mesh.size} learn, up to {config.staleness} rollouts ahead; of the "
        f"weights {plan.size / 2**20:.1f} MiB change, {plan.total / 2**20:.1f} MiB are sent for each rollout, at most "
        f"{max(plan.into.values()) / 2**20:.1f} MiB to a device"
    )
    empty = _nothing(config, sampler, trained.whole(params), prompts, there) if config.staleness else None
    return Stage(there, lambda params: trained.whole(ahead.move(cast(params), where)), plan.total, empty)


def make_draw(config: Any, sampler: Sampler, stage: Stage, mesh: Mesh) -> Callable[..., tuple]:
    """Makes `draw(queue, version, params, stream) -> (queue, (asked, position, rows), metrics)`.

    It is the rollout to learn from, its rows on the learner's mesh, once those ahead of it were started with the
    prompts that the stream gives next. Step k of a script draws with version k - 1.
    """
    limits = {"ahead": depth(config), "max_staleness": config.max_staleness, "total": config.steps}

    def start(weights: Params, stream: Iterator, number: int) -> tuple:
        asked, position = next(stream)
        placed = sharding.shard_batch((asked["tokens"], asked["lengths"]), stage.mesh)
        with jax.set_mesh(stage.mesh) if config.actors else contextlib.nullcontext():
            key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), number + 1))
            key = sharding.place(key, NamedSharding(stage.mesh, PartitionSpec()))
            return asked, position, sampler.sample(weights, *placed, key)

    def draw(queue: ahead.Queue, version: int, params: Params, stream: Iterator) -> tuple:
        starts = partial(start, stage.publish(params), stream)
        queue, rollout = ahead.draw(queue, version, starts, **limits)
        if not config.actors:
            return queue, rollout.value, {}
        asked, position, rows = rollout.value
        rows = ahead.move(rows, _rows_on(mesh, rows))
        metrics = {"staleness": version - rollout.version, "stale_dropped": queue.dropped, "sent_bytes": stage.size}
        return queue, (asked, position, rows), metrics

    return draw


def depth(config: Any) -> int:
    """How many rollouts are under way while one is learned from."""
    return config.staleness if config.actors else 0


def old_logp(config: Any, rows: sampling.Samples, newest: Callable[[], jax.Array] | None) -> jax.Array | None:
    """What the policy loss takes its ratio to: `newest()`, None for the very weights that learn.

    Where rollouts are by older ones and no correction makes up for that, it is the sampler's.
    """
    if depth(config) and config.correction == "none":
        return rows.logp
    return newest and newest()


def pack(stage: Stage, queue: ahead.Queue, depth: int) -> dict[str, Any]:
    """What a checkpoint holds of the rollouts under way, always of `depth` of them; it waits for none."""
    versions = [rollout.version for rollout in queue.waiting]
    rows = [rollout.value[2] for rollout in queue.waiting]
    missing = depth - len(rows)
    versions = np.array(versions + [-1] * missing, np.int32)
    return {
        "started": queue.started,
        "dropped": queue.dropped,
        "versions": versions,
        "rows": rows + [stage.empty] * missing,
    }


def unpack(packed: Mapping[str, Any], stream: Iterator) -> ahead.Queue:
    """The queue that was packed; the prompts of its rollouts are what the stream gives next."""
    found = [(int(version), rows) for version, rows in zip(packed["versions"], packed["rows"]) if version >= 0]
    waiting = tuple(ahead.Stamped(version, (*next(stream), rows)) for version, rows in found)
    return ahead.Queue(waiting, packed["started"], packed["dropped"])


def _nothing(config: Any, sampler: Sampler, policy: Params, prompts: Prompts, mesh: Mesh) -> sampling.Samples:
    width = prompts.questions()["tokens"].shape[1]
    asked = jax.ShapeDtypeStruct((config.prompts, width), jnp.int32), jax.ShapeDtypeStruct((config.prompts,), jnp.int32)
    found = jax.eval_shape(sampler.sample, policy, *asked, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), found)
    return sharding.shard_batch(zeros, mesh)


def _mesh(config: Any) -> Mesh:
    devices = ahead.split_devices(config.actors)[1]
    return sharding.make_mesh(devices, data=-1, expert=config.expert, tensor=config.tensor)


def _rows_on(mesh: Mesh, rows: Any) -> Any:
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(sharding.row_axes(mesh))), rows)


def _like(shapes: Any, arrays: Any) -> Any:
    return jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), shapes, arrays)
