"""How rows enter a network: several as one row, or a prompt that they share once. Nothing but the model is told.

    loss_fn = layouts.bundled(grpo.make_loss(layouts.shared_prompt(model, width=512, members=8)))
    loss_fn = layouts.bundled(preference.make_loss(layouts.packed(model, width=2048, members=16)))

Every loss function, mask, advantage and metric stays a matter of rows, which follow one another in bundles of
`members`: only the model's body sees a bundle as one row, and `alignax.logprobs` finds each token's state in it. So a
layout serves every algorithm, and its values, gradients and metrics are those of the rows by themselves (but the sums
of a router, where a shared prompt counts once).

A batch for micro-batches, devices or `pmap` must not be split inside of a bundle. Its leaves lead with [R, K], the
bundles and what they hold, and `bundled` makes rows of them. The two sides of a pair are a bundle by themselves.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from alignax.types import Array, Hidden, Model, Params


def packed(model: Model, *, width: int, members: int) -> Model:
    """The model with `members` rows that follow one another as one row of `width` tokens, for training.

    Rows are contiguous and of one segment; `alignax.data.packing` groups them so that their lengths fit. Those of a
    bundle that does not fit come out as NaN.

    Args:
      model: that knows packed rows; an adapter's function of tokens and segments does.
      width: of a packed row.
      members: how many rows a bundle has, fillers included; of pairs, two for each.

    Raises:
      ValueError: for a number below 1, and when the rows do not come in bundles.
    """
    _check("packed", width=width, members=members)

    def hidden(params: Params, tokens: Array, segments: Array, *, key: Array | None = None, **other: Any) -> Hidden:
        _refuse("packed", other)
        tokens, real = _bundles("packed", members, tokens, segments != 0)
        row, numbers, at, fits = jax.vmap(partial(_one_row, width))(tokens, real)
        return _placed(model.hidden(params, row, numbers, key=key), fits, at)

    return _of_rows(model, hidden)


def shared_prompt(model: Model, *, members: int, width: int | None = None, completion: int | None = None) -> Model:
    """The model with the prompt that `members` rows begin with run once, forwards and backwards, for training.

    What the rows of a bundle share is found by comparing them: their common beginning within the first `width` columns,
    whatever the masks say. Of what follows a row may have T - width tokens, as samples of prompts of `width` columns
    do, whose prompts may be shorter; rows of a bundle that does not fit come out as NaN. Rows of padding are fillers.

    Args:
      model: whose body takes `prompt`, as `alignax.models.transformer` does.
      members: the completions of a prompt; 2 for pairs.
      width: columns that a prompt may have; or else
      completion: columns that a completion may have, of rows of any length, such as `max_new_tokens`.

    Raises:
      ValueError: for a number below 1, both or none of the widths, a model whose body takes no `prompt`, rows too short
        for one, and rows not in bundles.
    """
    if (width is None) == (completion is None):
        raise ValueError(f"layouts.shared_prompt: {width=}, {completion=}; expected one of them")
    _check("shared_prompt", members=members, width=width or completion or 0)
    taken = inspect.signature(model.hidden).parameters.values()
    if not any(x.name == "prompt" or x.kind is x.VAR_KEYWORD for x in taken):
        raise ValueError(
            f"layouts.shared_prompt: the model's hidden takes {[x.name for x in taken]}; expected `prompt` among them, "
            "as alignax.models.transformer takes it"
        )

    def hidden(params: Params, tokens: Array, segments: Array, *, key: Array | None = None, **other: Any) -> Hidden:
        _refuse("shared_prompt", other)
        columns = width or tokens.shape[1] - (completion or 0)
        if not 0 < columns < tokens.shape[1]:
            raise ValueError(f"layouts.shared_prompt: rows of {tokens.shape[1]} tokens; {width=}, {completion=}")
        tokens, real = _bundles("shared_prompt", members, tokens, segments != 0)
        row, numbers, positions, at, fits = jax.vmap(partial(_one_prompt, columns))(tokens, real)
        found = model.hidden(params, row, numbers, positions=positions, prompt=(columns, members), key=key)
        return _placed(found, fits, at)

    return _of_rows(model, hidden)


def shared_prompt_gain(prompt: int, completion: int, members: int) -> float:
    """How many times fewer tokens run through the network than without sharing, at these lengths."""
    return members * (prompt + completion) / (prompt + members * completion)


def bundled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A loss or statistics function `(params, batch, ...)` for a batch whose leaves lead with [R, K] instead of [B]."""

    def of_bundles(params: Params, batch: Any, *args: Any, **options: Any) -> Any:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        return function(params, rows, *args, **options)

    of_bundles.whole_batch = getattr(function, "whole_batch", False)  # pyright: ignore[reportFunctionMemberAccess]
    return of_bundles


def _one_row(width: int, tokens: Int[Array, "n T"], real: Bool[Array, "n T"]):
    """A bundle's rows behind one another: tokens, whose they are [width], where each went [n, T], whether all fit."""
    lengths = jnp.sum(real, axis=1, dtype=jnp.int32)
    ends = jnp.cumsum(lengths)
    starts, slots = ends - lengths, jnp.arange(width)
    filled = slots < ends[-1]
    member = jnp.where(filled, jnp.searchsorted(ends, slots, side="right"), 0)
    column = jnp.where(filled, slots - starts[member], 0)
    at = jnp.expand_dims(starts, 1) + jnp.expand_dims(jnp.arange(tokens.shape[1]), 0)
    row = jnp.where(filled, tokens[member, column], 0)
    return row, jnp.where(filled, member + 1, 0), jnp.minimum(at, width - 1), ends[-1] <= width


def _one_prompt(width: int, tokens: Int[Array, "n T"], real: Bool[Array, "n T"]):
    """What the rows have in common, then the rest of each: tokens, whose they are, positions, where each went, fit."""
    (count, total), (prompt, first) = tokens.shape, _common(width, tokens, real)
    length, in_prompt = total - width, jnp.arange(width) < prompt
    behind = prompt + jnp.arange(length)
    numbers = jnp.where(real[:, behind], jnp.expand_dims(jnp.arange(2, count + 2), 1), 0)
    row = jnp.concatenate([jnp.where(in_prompt, first, 0), tokens[:, behind].reshape(-1)])
    positions = jnp.concatenate([jnp.arange(width), jnp.tile(behind, count)])
    columns = jnp.arange(total)
    own = jnp.expand_dims(width + jnp.arange(count) * length, 1) + jnp.expand_dims(columns - prompt, 0)
    at = jnp.where(jnp.expand_dims(columns < prompt, 0), jnp.expand_dims(columns, 0), own)
    numbers = jnp.concatenate([in_prompt.astype(jnp.int32), numbers.reshape(-1)])
    fits = jnp.all(jnp.sum(real, axis=1) <= prompt + length)
    return row, numbers, positions, jnp.clip(at, 0, len(row) - 1), fits


def _common(width: int, tokens: Int[Array, "n T"], real: Bool[Array, "n T"]) -> tuple[Int[Array, ""], Int[Array, " P"]]:
    """How much of the first columns the rows have in common, fillers apart, and a row that has it."""
    empty = ~jnp.any(real, axis=1)
    chosen = jnp.argmin(empty)
    same = (tokens == jnp.expand_dims(tokens[chosen], 0)) & real & jnp.expand_dims(real[chosen], 0)
    same = jnp.all(same | jnp.expand_dims(empty, 1), axis=0)[:width] & ~empty[chosen]
    return jnp.sum(jnp.cumprod(same.astype(jnp.int32))), tokens[chosen, :width]


def _placed(found: Hidden, fits: Bool[Array, " R"], at: Int[Array, "R n T"]) -> Hidden:
    nan = jnp.array(jnp.nan, found.states.dtype)  # loud, where tokens would be lost
    states = jnp.where(jnp.expand_dims(fits, (1, 2)), found.states, nan)
    return found._replace(states=states, at=at.reshape(-1, at.shape[2]))


def _of_rows(model: Model, hidden: Callable[..., Hidden]) -> Model:
    def no_cache(batch: int, length: int) -> Any:
        raise ValueError(f"a layout is for training: it has no cache for {batch} rows; sample with the model itself")

    return Model(model.init, hidden, model.logits, no_cache, model.config, model.values)


def _bundles(what: str, members: int, *arrays: Array) -> list[Array]:
    rows, length = arrays[0].shape
    if rows % members:
        raise ValueError(f"layouts.{what}: {rows} rows; expected bundles of members={members}")
    return [x.reshape(-1, members, length) for x in arrays]


def _check(what: str, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"layouts.{what}: {name}={number}; expected at least 1")


def _refuse(what: str, other: dict[str, Any]) -> None:
    if given := sorted(name for name, value in other.items() if value is not None):
        raise ValueError(
            f"layouts.{what}: {given} were given; expected rows of one segment, without positions or cache"
        )
