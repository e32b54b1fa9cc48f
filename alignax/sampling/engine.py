"""A slot engine: more prompts than fit, in a fixed number of slots that are filled again as they come free.

    engine = sampling.make_engine(model, slots=32, buckets=(64, 256), max_new_tokens=256)
    for place, rows in sampling.serve(engine, params, prompts, lengths, key, eos_ids=(2,)):
        ...  # the samples of prompts[place], numpy, as soon as they are done

A static batch runs until its slowest row is done. Here a jitted block of a few decoding steps runs on all slots, and
between blocks finished prompts leave and waiting ones enter, prefilled a few at a time. The host reads what a block did
only after it has dispatched the next, so the device never waits for it: a slot stays idle for the rest of its block and
one more. There is one transfer to the host per block, by `to_host`.

The rows of a prompt enter and leave together and share its keys and values. Where lengths differ much and prompts are
short, groups of 1 waste less.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignax.sampling import checks, draw, loop
from alignax.sampling.choose import Process
from alignax.sampling.generate import Samples, samples, start
from alignax.sampling.settings import Settings
from alignax.types import Array, Model, Params


class Engine(NamedTuple):
    """What `serve` runs, compiled: `prefill` once for each bucket, `insert` and `block` once for each room."""

    check: Callable  # (prompts, lengths) -> None; raises
    unroll: Callable  # (params) -> params for `prefill` and `block`
    empty: Callable  # (params, key, Settings of one row) -> State without prompts
    prefill: Callable  # (params, key, Entering) -> State of E prompts
    insert: Callable  # (State, that of E prompts, slots [E]) -> State; donates the first
    resize: Callable  # (State, room) -> State whose rows have so many slots of their own
    block: Callable  # (params, State) -> State, (done [S], Samples); donates
    slots: int
    group: int
    entering: int
    steps: int  # of a block
    buckets: tuple[int, ...]
    rooms: tuple[int, ...]  # the last is max_new_tokens


class Entering(NamedTuple):
    """Prompts on their way into slots."""

    prompts: Any  # [E, P]
    lengths: Any  # [E]
    row_ids: Any  # [E * group]
    settings: Settings  # of E * group rows


class Served(NamedTuple):
    """A prompt that is done: its place among those asked, and its `group` rows as numpy arrays."""

    place: int
    samples: Samples


def make_engine(
    model: Model,
    *,
    slots: int,
    buckets: Sequence[int],
    max_new_tokens: int,
    group: int = 1,
    block: int = 8,
    entering: int = 4,
    process: tuple[Process, ...] = (),
    place: Callable[[Any], Any] = lambda state: state,
) -> Engine:
    """Compiles nothing yet; see `serve`.

    Args:
      model: any `Model`.
      slots: prompts in flight, each with its `group` rows: the decoding batch is slots * group.
      buckets: widths that prompts are padded to for the prefill, one compiled program each; the largest is the longest
        prompt there may be.
      max_new_tokens: the room for each completion.
      group: completions of each prompt.
      block: decoding steps between two looks at what is done. Fewer waste fewer steps of finished rows, more hide more
        work of the host.
      entering: prompts that are prefilled together.
      process: see `generate`.
      place: puts a state on devices: `partial(sharding.shard_batch, mesh=mesh)` on a mesh, whose data axis must divide
        the slots.

    Raises:
      ValueError: for counts below 1, and rows longer than the model's context.
    """
    checks.static(slots=slots, max_new_tokens=max_new_tokens, group=group, block=block, entering=entering)
    if not buckets:
        raise ValueError("sampling: no buckets; expected at least one width of prompts")
    checks.static(**{f"buckets[{i}]": width for i, width in enumerate(buckets)})
    buckets = tuple(sorted(set(buckets)))
    checks.context(model, buckets[-1], max_new_tokens)
    rooms = loop.rooms(model, max_new_tokens)
    sizes = {"group": group, "slots": max_new_tokens, "width": buckets[-1], "room": rooms[0]}

    def prefill(params: Params, key: Array, entering: Entering) -> loop.State:
        keys = draw.row_keys(key, entering.row_ids)
        return start(model, params, entering.prompts, entering.lengths, keys, entering.settings, **sizes)

    def empty(params: Params, key: Array, settings: Settings) -> loop.State:
        shapes = jax.eval_shape(prefill, params, key, _nobody(slots, buckets[-1], group, settings))
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(keys=None, settings=None))
        rows, ones = slots * group, jnp.ones(slots * group, jnp.int32)
        return state._replace(
            keys=jnp.broadcast_to(key[None], (rows, *key.shape)),
            settings=jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), settings),
            starts=ones,
            ends=ones,
            stopped=jnp.ones(rows, bool),
        )

    def insert(state: loop.State, entering: loop.State, where: Array) -> loop.State:
        rows = (where[:, None] * group + jnp.arange(group)[None]).reshape(-1)

        def put(whole: Array, part: Array) -> Array:
            # Slots of its own, of which there may be more by now: empty, since even unseen a NaN would spoil the row.
            new = part if part.shape[1:] == whole.shape[1:] else 0
            return whole.at[where if len(part) == len(where) else rows].set(new, mode="drop")

        return jax.tree.map(put, state, entering)

    def resize(state: loop.State, room: int) -> loop.State:
        assert model.resize is not None  # there are several rooms
        return state._replace(cache=model.resize(state.cache, room))

    def step(params: Params, state: loop.State) -> tuple[loop.State, tuple[Array, Samples]]:
        state = loop.decode(model, params, state, steps=block, process=process)
        done = jnp.all(state.done.reshape(slots, group), axis=1)
        return state, (done, samples(state, jnp.ones(slots * group, bool)))

    empty_rows = jax.jit(empty)
    return Engine(
        partial(checks.vocabulary, model),
        jax.jit(partial(loop.unrolled, model)),
        lambda *args: place(empty_rows(*args)),
        jax.jit(prefill),
        jax.jit(insert, donate_argnums=0),
        jax.jit(resize, static_argnums=1),
        jax.jit(step, donate_argnums=1),
        slots,
        group,
        entering,
        block,
        buckets,
        rooms,
    )


def serve(
    engine: Engine,
    params: Params,
    prompts: Any,
    lengths: Any,
    key: Array,
    *,
    row_ids: Any = None,
    **settings: Any,
) -> Iterator[Served]:
    """Samples every prompt and yields each when it is done, in whatever order that is.

    With equal compiled shapes (as many rows) a sample is the one that `generate` draws with the same key and row id.

    Args:
      engine: from `make_engine`.
      params: the model's parameters.
      prompts: [N, P] token ids from column 0, on the host; P may exceed the largest bucket where no prompt does.
      lengths: [N] tokens of each prompt.
      key: is consumed.
      row_ids: [N * group], the identity of each row's randomness; None: 0 to N * group - 1.
      settings: those of `generate`, one for all or one for each of the N * group rows.

    Yields:
      `Served`: a prompt's place and its rows, `T = max(buckets) + max_new_tokens` columns.

    Raises:
      ValueError, TypeError: as `generate` does, before the first block runs.
    """
    prompts, lengths = np.asarray(prompts), np.asarray(lengths)
    count, group = len(prompts), engine.group
    checks.prompts(prompts, lengths, None if row_ids is None else np.asarray(row_ids), group=group)
    engine.check(prompts, lengths)
    if lengths.max() > engine.buckets[-1]:
        raise ValueError(f"sampling: a prompt of {lengths.max()} tokens; expected at most {engine.buckets[-1]}")
    row_ids = np.arange(count * group, dtype=np.int32) if row_ids is None else np.asarray(row_ids, np.int32)
    settings = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in settings.items()}
    asked = to_host(Settings.make(count * group, max_new_tokens=engine.rooms[-1], **settings))
    ids: dict[str, Any] = {
        name: jnp.full(getattr(asked, name).shape[1:], -1) for name in ("eos_ids", "forbidden", "stop")
    }
    budget = asked.max_tokens.reshape(count, group).max(axis=1)
    idle = Settings.make(1, max_new_tokens=1, **ids)  # bends nothing beside it
    state = engine.empty(params, key, idle)
    return _serve(engine, params, key, state, _Queue(prompts, lengths, row_ids, asked, budget))


def collect(served: Iterator[Served]) -> Samples:
    """All rows in the order of the prompts, as `generate` gives them: numpy arrays `[N * group, T]`."""
    rows = [found.samples for found in sorted(served, key=lambda found: found.place)]
    if not rows:
        raise ValueError(
            "sampling: nothing to collect; expected what `serve` yields, before anything was taken from it"
        )
    return jax.tree.map(lambda *parts: np.concatenate(parts), *rows)


def to_host(tree: Any) -> Any:
    """Numpy arrays: the only function of the engine that waits for the device."""
    return jax.device_get(tree)


class _Queue(NamedTuple):
    """What is asked, on the host."""

    prompts: np.ndarray
    lengths: np.ndarray
    row_ids: np.ndarray
    settings: Settings
    budget: np.ndarray  # [N], the most tokens of any row of a prompt


def _serve(engine: Engine, params: Params, key: Array, state: Any, queue: _Queue) -> Iterator[Served]:
    params, waiting = engine.unroll(params), deque(range(len(queue.prompts)))
    inside, free, unread = {}, deque(range(engine.slots)), None
    room, ages = engine.rooms[0], np.zeros(engine.slots, int)  # ages: the tokens that a slot's rows may have
    while waiting or inside:
        while waiting and len(free) >= min(engine.entering, len(waiting), engine.slots):
            taken = [(free.popleft(), waiting.popleft()) for _ in range(min(engine.entering, len(free), len(waiting)))]
            inside |= dict(taken)
            ages[[slot for slot, _ in taken]] = 0
            new, where = jax.device_put(_entering(engine, queue, taken))
            state = engine.insert(state, engine.prefill(params, key, new), where)
        ages += engine.steps
        tokens = max(min(int(ages[slot]), int(queue.budget[index])) for slot, index in inside.items())
        wanted = next(enough for enough in engine.rooms if enough >= tokens)
        if wanted > room or wanted <= room // 2:
            room, state = wanted, engine.resize(state, wanted)
        state, report = engine.block(params, state)
        jax.tree.map(lambda x: x.copy_to_host_async(), report)
        for slot, index, rows in _finished(engine, unread):
            del inside[slot]
            free.append(slot)
            yield Served(index, rows)
        unread = report, dict(inside)  # without those that have just left: this report still calls them done


def _finished(engine: Engine, unread: tuple | None) -> Iterator[tuple[int, int, Samples]]:
    """The slots whose prompts were done in a block, those prompts, and their rows."""
    if unread is None:
        return
    (done, rows), inside = to_host(unread[0]), unread[1]
    for slot in np.flatnonzero(done).tolist():
        if slot in inside:
            own = np.arange(slot * engine.group, (slot + 1) * engine.group)
            yield slot, inside[slot], Samples(*(x[own] for x in rows))


def _entering(engine: Engine, queue: _Queue, taken: list[tuple[int, int]]) -> tuple[Entering, np.ndarray]:
    """The prompts of `taken`, pairs of slot and index, filled up to the engine's number, and the slots they go to.

    What fills up is the last of them once more, for a slot that does not exist: it is dropped.
    """
    slots, indices = (np.array(x, np.int32) for x in zip(*taken))
    missing = engine.entering - len(taken)
    indices = np.pad(indices, (0, missing), mode="edge")
    longest = queue.lengths[indices].max()
    width = next(bucket for bucket in engine.buckets if bucket >= longest)
    prompts = np.pad(queue.prompts[indices, :width], ((0, 0), (0, max(0, width - queue.prompts.shape[1]))))
    rows = (indices[:, None] * engine.group + np.arange(engine.group)).reshape(-1)
    settings = jax.tree.map(lambda x: x[rows], queue.settings)
    lengths = queue.lengths[indices].astype(np.int32)
    entering = Entering(prompts.astype(np.int32), lengths, queue.row_ids[rows], settings)
    return entering, np.pad(slots, (0, missing), constant_values=engine.slots)


def _nobody(slots: int, width: int, group: int, settings: Settings) -> Entering:
    """Shapes of an engine full of prompts."""
    ids = jnp.zeros(slots, jnp.int32)
    rows = jax.tree.map(lambda x: jnp.repeat(x, slots * group, axis=0), settings)
    return Entering(jnp.zeros((slots, width), jnp.int32), ids, jnp.repeat(ids, group), rows)
