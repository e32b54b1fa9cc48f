"""Prefill and the decoding loop: a model and a way to choose tokens in, filled rows out.

Rows are filled in place and never out of step with their cache: the token of column c lies in slot c. One step feeds
the last token of each row and writes the next. That the prefill has seen the last token of the prompt before changes
nothing but spares the loop a first step of another kind; and a row that is done feeds its last token to the slot it
already lies in, so it changes nothing and stays in bounds.
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


def prefill(model: Model, params: Params, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], *, size: int) -> Cache:
    """A cache of `size` slots that holds the prompts.

    Without positions a model puts the tokens of a row into its first slots. Padding goes into those behind the prompt;
    the completion overwrites each of them before a token sees it.
    """
    batch, width = prompts.shape
    segments = (jnp.arange(width)[None] < lengths[:, None]).astype(jnp.int32)
    return model.hidden(params, prompts, segments, cache=model.init_cache(batch, size)).cache


def decode(
    model: Model, params: Params, state: State, choose: Choose, *, max_new_tokens: int, eos_ids: tuple[int, ...]
) -> State:
    """Fills rows until each has an EOS or max_new_tokens more tokens.

    choose: `(logits [R, V], tokens [R, T], columns [R]) -> (token [R], logp [R])`.
    """

    def unfinished(carry):
        count, state = carry
        return (count < max_new_tokens) & ~jnp.all(state.done)

    def step(carry):
        count, state = carry
        logits, cache = _feed(model, params, state)
        token, logp = choose(logits, state.tokens, state.ends)
        return count + 1, _append(state._replace(cache=cache), token, logp, eos_ids)

    return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]


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
