"""Prefill and the decoding loop: a model and a way to choose tokens in, filled rows out.

Rows are filled in place and never out of step with their cache. One step feeds the last token of each row and writes
the next. The prompt's last token is the first that is fed, so that every step is of one kind: the rows of a prompt
share the cache of all its tokens but that one. A row that is done feeds its last token to the slot it already lies in,
or to none: it changes nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.sampling import draw
from alignax.sampling.choose import Chosen, Process, choose
from alignax.sampling.settings import Settings
from alignax.types import Array, Cache, Model, Params


class State(NamedTuple):
    """Rows that are being filled, and all that belongs to them. Leaves lead with R, or B for what prompts share."""

    cache: Cache
    tokens: Int[Array, "R T"]  # 0 from `ends` on
    logp: Float[Array, "R T"]  # 0 but for chosen tokens
    processed_logp: Float[Array, "R T"]
    starts: Int[Array, " R"]  # the prompt's length
    ends: Int[Array, " R"]  # the filled columns, prompt and completion
    stopped: Bool[Array, " R"]  # an EOS or a stop sequence was chosen
    keys: Array  # [R]
    settings: Settings

    @property
    def done(self) -> Bool[Array, " R"]:
        """Rows that take no more tokens."""
        return self.stopped | (self.ends - self.starts >= self.settings.max_tokens)


def prefill(
    model: Model,
    params: Params,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    group: int,
    slots: int,
    width: int | None = None,
) -> Cache:
    """A cache of B * group rows that hold the prompts, each with room for `slots` more tokens.

    Without positions a model puts the tokens of a row into its first slots. Padding goes into those behind the prompt,
    where no token sees it before it is overwritten.

    width: the tokens that a prompt may have in this cache; None: P.
    """
    batch, given = prompts.shape
    width = given if width is None else width
    segments = (jnp.arange(given)[None] < lengths[:, None]).astype(jnp.int32)
    cache = model.init_cache(batch, width if model.fork else width + slots)
    cache = model.hidden(params, prompts, segments, cache=cache).cache
    if model.fork is None:
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, group, axis=0), cache) if group > 1 else cache
    return model.fork(cache, lengths - 1, group, slots)


def rooms(model: Model, tokens: int) -> tuple[int, ...]:
    """The sizes through which the rows' own slots grow on the way to so many new tokens."""
    return (tokens,) if model.rooms is None or model.resize is None else model.rooms(tokens)


def decode(
    model: Model,
    params: Params,
    state: State,
    *,
    steps: int,
    rooms: tuple[int, ...] = (),
    process: tuple[Process, ...] = (),
) -> State:
    """Fills rows until all are done, by at most `steps` tokens each.

    params: as `Model.unroll` has them. rooms: where rows are new, the sizes through which their own slots grow; a loop
    is compiled for each.
    """
    # all numbers at once: a generator is many small operations, and a row that is not done is at its `ends` + count
    columns = state.ends[None] + jnp.arange(steps)[:, None]
    numbers = jax.vmap(draw.uniforms, (None, 0))(state.keys, columns)

    def unfinished(room, carry):
        count, state = carry
        return (count < room) & ~jnp.all(state.done)

    def step(carry):
        count, state = carry
        logits, state = feed(model, params, state)
        uniform = jax.lax.dynamic_index_in_dim(numbers, count, keepdims=False)
        chosen = choose(logits, state.tokens, state.ends, uniform=uniform, settings=state.settings, process=process)
        return count + 1, append(state, chosen)

    count = jnp.int32(0)
    for room in rooms or (steps,):
        if len(rooms) > 1 and model.resize is not None:
            state = state._replace(cache=model.resize(state.cache, room))
        count, state = jax.lax.while_loop(partial(unfinished, room), step, (count, state))
    return state


def unrolled(model: Model, params: Params) -> Params:
    """Parameters as decoding reads them fastest."""
    return params if model.unroll is None else model.unroll(params)


def feed(model: Model, params: Params, state: State) -> tuple[Float[Array, "R V"], State]:
    """Runs the last token of each row; the logits of the column behind it, and the state with its slot filled."""
    last = state.ends[:, None] - 1
    token = jnp.take_along_axis(state.tokens, last, axis=1)
    hidden = model.hidden(params, token, jnp.ones_like(token), positions=last, cache=state.cache)
    return model.logits(params, hidden.states[:, 0]), state._replace(cache=hidden.cache)


def append(state: State, chosen: Chosen) -> State:
    """Writes the token of each row that is not done at its end."""
    done = state.done
    at = jnp.where(done, state.tokens.shape[1], state.ends)  # out of bounds, and dropped
    tokens = _put(state.tokens, at, chosen.token)
    ends = state.ends + ~done
    return state._replace(
        tokens=tokens,
        logp=_put(state.logp, at, chosen.logp),
        processed_logp=_put(state.processed_logp, at, chosen.processed_logp),
        ends=ends,
        stopped=state.stopped | (~done & _stops(tokens, state.starts, ends, chosen.token, state.settings)),
    )


@jax.vmap
def _put(row: Array, column: Array, value: Array) -> Array:
    # mapped over the rows: where they are sharded, every device writes its own
    return row.at[column].set(value, mode="drop")


def _stops(tokens: Array, starts: Array, ends: Array, token: Array, settings: Settings) -> Bool[Array, " R"]:
    """Whether the last token of each row is an EOS or ends a stop sequence that lies in the completion."""
    found = jnp.any(settings.eos_ids == token[:, None], axis=1)
    length = settings.stop.shape[2]
    if settings.stop.shape[1] == 0:
        return found
    columns = ends[:, None] - length + jnp.arange(length)[None]
    window = jnp.take_along_axis(tokens, jnp.maximum(columns, 0), axis=1)
    window = jnp.where(columns >= starts[:, None], window, -2)[:, None]  # no id, and not the -1 that any token matches
    matches = jnp.all((settings.stop == window) | (settings.stop == -1), axis=2)
    return found | jnp.any(matches & (settings.stop[:, :, -1] >= 0), axis=1)
