"""Rollouts sampled ahead of the updates that learn from them: actors and learner on devices of their own.

A call to a compiled function returns before its result is there, so one Python thread keeps both sides busy. While the
learner's devices make update k, the actors' sample rollout k + 1 with the weights of before it:

    learners, actors = (sharding.make_mesh(devices, data=-1) for devices in ahead.split_devices(4))
    where = sharding.shardings(state.params, actors, models.RULES)
    print(ahead.plan_transfer(state.params, where).total, "bytes for each version of the weights")
    queue = ahead.Queue()
    for version in range(steps):  # the updates that the weights have seen
        weights = ahead.move(state.params, where)
        queue, rollout = ahead.draw(queue, version, partial(sample, weights), ahead=1)  # starts one, waits for none
        batch = learn_from(rollout.value)  # rewards of its texts: waits for the rollout, which was started before
        state, metrics = update(state, batch)

Nothing depends on who is first: rollout k is by the weights of version max(0, k - 1 - ahead) in every run, so the same
seed gives the same bits. With `ahead=0` it is by the newest ones, and the loop is the synchronous one. A rollout says
with which version it was sampled; those too old may be dropped, by a bound, and what is learned from the others is
corrected as any off-policy sample is: `old_logp` of the sampler (`Samples.logp`) gives policy losses the ratio to the
policy that sampled, or `alignax.corrections` weighs by it and the loss clips around the learner's own policy.

One step off is "Asynchronous RLHF: Faster and More Efficient Off-Policy RL for Language Models", Noukhovitch et al.
(https://arxiv.org/abs/2410.18252); the bound, and the loss that keeps both ratios apart, "AReaL: A Large-Scale
Asynchronous Reinforcement Learning System for Language Reasoning", Fu et al. (https://arxiv.org/abs/2505.24298).
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from alignax.types import Array, Scalar


class Stamped(NamedTuple):
    """A rollout, and the version of the weights that sampled it."""

    version: int
    value: Any


class Queue(NamedTuple):
    """Rollouts that were started and not yet learned from, oldest first; numbers and arrays only, for a checkpoint."""

    waiting: tuple[Stamped, ...] = ()
    started: int = 0
    dropped: int = 0


class Transfer(NamedTuple):
    """What moving a tree takes, in bytes."""

    size: int  # of the tree, every number once
    into: dict[Any, int]  # what each device receives that it does not hold

    @property
    def total(self) -> int:
        """What all devices receive."""
        return sum(self.into.values())


def split_devices(actors: int, devices: Sequence[Any] | None = None) -> tuple[list[Any], list[Any]]:
    """The devices of the learner and those of so many actors: of each process the last ones sample.

    Every process then has a part in both, and weights need not leave it.

    Args:
      actors: the number of devices that sample; it divides among the processes.
      devices: all of them; None: `jax.devices()`.

    Raises:
      ValueError: when a process would have none of either.
    """
    of_process: dict[int, list[Any]] = collections.defaultdict(list)
    for device in jax.devices() if devices is None else devices:
        of_process[device.process_index].append(device)
    each, rest = divmod(actors, len(of_process))
    least = min(map(len, of_process.values()))
    if rest or not 0 < each < least:
        raise ValueError(
            f"split_devices: actors={actors} for {len(of_process)} processes of at least {least} devices; expected as "
            "many of each process, fewer than it has"
        )
    groups = of_process.values()
    return [x for group in groups for x in group[:-each]], [x for group in groups for x in group[-each:]]


def plan_transfer(tree: Any, where: Any) -> Transfer:
    """The bytes that `move(tree, where)` will send, told from shapes and shardings alone.

    Args:
      tree: of arrays, or of shapes with or without a sharding (`jax.ShapeDtypeStruct`).
      where: a sharding for every leaf.
    """
    size, into = 0, collections.Counter()
    for leaf, target in zip(jax.tree.leaves(tree), jax.tree.leaves(where), strict=True):
        shape, width = leaf.shape, leaf.dtype.itemsize
        origin = getattr(leaf, "sharding", None)
        held = {} if origin is None else origin.devices_indices_map(shape)
        size += math.prod(shape) * width
        for device, wanted in target.devices_indices_map(shape).items():
            box = _box(wanted, shape)
            into[device] += width * (_volume(box) - _volume(_common(box, _box(held.get(device), shape))))
    return Transfer(size, dict(into))


def move(tree: Any, where: Any) -> Any:
    """Copies of the leaves in the shardings `where`; the copying starts now and nobody waits for it.

    They stay when the originals are donated. Cast first what shall travel in fewer bits (`sampling.rollout_params`).
    Where a mesh spans several processes a leaf is gathered on every device of its mesh first, since devices of
    different processes do not pass arrays on by themselves; what is on the way needs room there.

    Raises:
      ValueError: when a process has a part in one of the two meshes only.
    """
    return jax.tree.map(_move, tree, where)


def draw(
    queue: Queue,
    version: int,
    sample: Callable[[int], Any],
    *,
    ahead: int = 1,
    max_staleness: int | None = None,
    total: int | None = None,
) -> tuple[Queue, Stamped]:
    """The rollout to learn from, after as many others were started as shall be under way behind it.

    Args:
      queue: what is under way.
      version: of the weights that `sample` uses, as many updates as they have seen; never less than before.
      sample: `(number) -> rollout`, which starts the rollout of that number (from 0) and waits for nothing. Whatever
        is random in it is a matter of the number.
      ahead: how many are under way while one is learned from; 0: none, every rollout is by the newest weights.
      max_staleness: a rollout more versions behind than this is dropped, and another started; None: none is. A bound
        of `ahead` or more drops nothing where every rollout makes one version.
      total: the rollouts that will be learned from; none is started beyond them. None: there is no end.

    Returns:
      The queue without it, and the rollout with its version; `version` less this is its staleness.

    Raises:
      ValueError: for numbers below 0, a version below that of a rollout in the queue, and when all were drawn.
    """
    for name, value in {"ahead": ahead, "max_staleness": max_staleness}.items():
        if value is not None and value < 0:
            raise ValueError(f"draw: {name}={value}; expected 0 or more")
    waiting, started, dropped = list(queue.waiting), queue.started, queue.dropped
    if waiting and version < waiting[-1].version:
        raise ValueError(f"draw: version={version} after {waiting[-1].version}; expected one that never falls")
    while True:
        while len(waiting) <= ahead and (total is None or started - dropped < total):
            waiting.append(Stamped(version, sample(started)))
            started += 1
        if not waiting:
            raise ValueError(f"draw: total={total} rollouts were drawn; expected no further call")
        rollout = waiting.pop(0)
        if max_staleness is None or version - rollout.version <= max_staleness:
            return Queue(tuple(waiting), started, dropped), rollout
        dropped += 1


def fresh(versions: Int[Array, " B"], version: Scalar, *, max_staleness: Scalar) -> Float[Array, " B"]:
    """Weights of rows: 1 where version - versions <= max_staleness, else 0; for rows that come by different weights.

    Args:
      versions: `[B]`, of the weights that sampled each row; of a row by several, the oldest.
      version: of the weights that learn.
      max_staleness: the bound (AReaL: eta).
    """
    return (version - versions <= max_staleness).astype(jnp.float32)


def _move(x: Any, where: NamedSharding) -> Any:
    if not isinstance(x, jax.Array) or (x.is_fully_addressable and where.is_fully_addressable):
        return jax.device_put(x, where, may_alias=False)
    origin, mesh = x.sharding, getattr(x.sharding, "mesh", None)
    if not (origin.addressable_devices and where.addressable_devices) or not isinstance(mesh, Mesh):
        raise ValueError(
            f"move: process {jax.process_index()} has {len(origin.addressable_devices)} devices of where an array is "
            f"and {len(where.addressable_devices)} of where it goes; expected some of both (see split_devices)"
        )
    with jax.set_mesh(mesh):  # whichever mesh is in effect outside
        own = _gather(NamedSharding(mesh, PartitionSpec()))(x).addressable_shards[0].data
    parts = where.addressable_devices_indices_map(x.shape).items()
    with jax.set_mesh(Mesh(np.array([own.device]), ("own",))):
        copies = [jax.device_put(own[index], device, may_alias=False) for device, index in parts]
    return jax.make_array_from_single_device_arrays(x.shape, where, copies)


@functools.cache
def _gather(whole: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(lambda x: x, out_shardings=whole)


Box = list[tuple[int, int]]  # of a shard: from and to, for each axis


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Box | None:
    return None if index is None else [part.indices(size)[:2] for part, size in zip(index, shape)]


def _common(one: Box | None, other: Box | None) -> Box | None:
    if one is None or other is None:
        return None
    return [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other)]


def _volume(box: Box | None) -> int:
    return 0 if box is None else math.prod(max(0, end - start) for start, end in box)
