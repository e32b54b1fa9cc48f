"""Prefill and the decoding loop: a model and a way to choose tokens in, filled rows out.

Rows are filled in place and are never out of step with their cache: the token of column c lies in slot c. A row that is
done feeds its last token to the slot it already lies in, so it changes nothing and stays in bounds.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.types import Array, Cache, Model, Params

Choose = Callable[[Array, Array, Array], tuple[Array, Array]]


class State(NamedTuple):
    """Rows that are being filled."""

    cache: Cache
    tokens: Int[Array, "R T"]  # 0 from `ends` on
    logp: Float[Array, "R T"]  # 0 but for chosen tokens
    ends: Int[Array, " R"]  # the filled columns, prompt and completion
    done: Bool[Array, " R"]  # an EOS was chosen


def prefill(
    model: Model, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], *, size: int
) -> tuple[Cache, Float[Array, "B V"]]:
    """A cache of `size` slots that holds the prompts, and the logits after the last token of each.

    Without positions the tokens of a row go to its first slots. Padding goes into those behind the prompt; the
    completion overwrites each of them before a token sees it.
    """
    batch, width = prompts.shape
    segments = (jnp.arange(width)[None] < lengths[:, None]).astype(jnp.int32)
    hidden = model.hidden(params, prompts, segments, cache=model.init_cache(batch, size))
    last = jnp.take_along_axis(hidden.states, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return hidden.cache, model.logits(params, last)


def decode(
    model: Model,
    params: Params,
    state: State,
    logits: Float[Array, "R V"],
    choose: Choose,
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
) -> State:
    """Fills rows until each has an EOS or max_new_tokens more tokens; `logits` are those of the first column to fill.

    choose: `(logits [R, V], tokens [R, T], columns [R]) -> (token [R], logp [R])`.
    """
    state = _append(state, *choose(logits, state.tokens, state.ends), eos_ids)

    def unfinished(carry):
        count, state = carry
        return (count < max_new_tokens) & ~jnp.all(state.done)

    def step(carry):
        count, state = carry
        logits, cache = _feed(model, params, state)
        state = state._replace(cache=cache)
        return count + 1, _append(state, *choose(logits, state.tokens, state.ends), eos_ids)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(1), state))[1]


def _feed(model: Model, params: Params, state: State) -> tuple[Array, Cache]:
    """Runs the last token of each row; the logits of the column behind it, and the cache with its slot filled."""
    last = state.ends[:, None] - 1
    token = jnp.take_along_axis(state.tokens, last, axis=1)
    hidden = model.hidden(params, token, jnp.ones_like(token), positions=last, cache=state.cache)
    return model.logits(params, hidden.states[:, 0]), hidden.cache


def _append(state: State, token: Array, logp: Array, eos_ids: tuple[int, ...]) -> State:
    """Writes the token of each row that is not done at its end."""
    rows, size = state.tokens.shape
    column = jnp.where(state.done, size, state.ends)  # out of bounds, and dropped
    at = jnp.arange(rows), column
    eos = jnp.zeros_like(state.done)
    for eos_id in eos_ids:
        eos |= token == eos_id
    return state._replace(
        tokens=state.tokens.at[at].set(token, mode="drop"),
        logp=state.logp.at[at].set(logp, mode="drop"),
        ends=state.ends + ~state.done,
        done=state.done | eos,
    )
