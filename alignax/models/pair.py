"""Two models of one vocabulary that run side by side and whose logits are mixed: one `Model`.

    params = {"policy": ..., "reference": ..., "weight": ...}

Each keeps its own cache. The states of the two lie behind one another along the last axis.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Cache, Hidden, Model, Params, Scalar


def pair(what: str, members: Mapping[str, Model], numbers: Mapping[str, Scalar], mix: Callable[..., Array]) -> Model:
    """Makes one model of two.

    Both networks run, and both keep a cache; a prompt's cache is shared by its rows only if both can. The
    configuration is that of the member with the shorter context, the first of equals. There is no scalar head, and
    auxiliary losses are the first member's.

    Args:
      what: it is, for errors.
      members: two models by the names of their parameters. They may be the same.
      numbers: the other parameters and their initial values: arrays, so that changing them compiles nothing.
      mix: `(logits of the first [..., V], logits of the second [..., V], **numbers) -> logits [..., V]`.

    Raises:
      ValueError: when other parameters reach it, or the vocabularies differ.
    """
    (one, first), (two, second) = members.items()

    def init(key: Array) -> Params:
        params = first.init(key)
        other = params if second is first else second.init(jax.random.fold_in(key, 1))
        return {one: params, two: other} | {name: jnp.asarray(value) for name, value in numbers.items()}

    def parts(params: Params) -> tuple[Params, Params, dict[str, Array]]:
        if not (isinstance(params, dict) and set(params) == {*members, *numbers}):
            found = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise ValueError(f"{what} got parameters {found}; expected {(*members, *numbers)}")
        return params[one], params[two], {name: params[name] for name in numbers}

    def hidden(params: Params, *rows: Array, cache: Cache = None, **options: Any) -> Hidden:
        of_one, of_two, _ = parts(params)
        caches = (None, None) if cache is None else cache
        found = first.hidden(of_one, *rows, cache=caches[0], **options)
        other = second.hidden(of_two, *rows, cache=caches[1], **options)
        states = jnp.concatenate([found.states, other.states], axis=-1)
        return Hidden(states, None if cache is None else (found.cache, other.cache), found.aux)

    def state(params: Params) -> Array:
        # with a cache, since unrolled parameters are for that
        token = jnp.zeros((1, 1), jnp.int32)
        return first.hidden(params, token, token + 1, positions=token, cache=first.init_cache(1, 1)).states

    def logits(params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        of_one, of_two, values = parts(params)
        halves = jnp.split(states, [jax.eval_shape(state, of_one).shape[-1]], axis=-1)
        found, other = first.logits(of_one, halves[0]), second.logits(of_two, halves[1])
        if found.shape != other.shape:
            sizes = found.shape[-1], other.shape[-1]
            raise ValueError(f"{what} of vocabularies of {sizes[0]} ({one}) and {sizes[1]} ({two}); expected one size")
        return mix(found, other, **values)

    def init_cache(batch: int, length: int) -> Cache:
        return first.init_cache(batch, length), second.init_cache(batch, length)

    def unroll(params: Params) -> Params:
        found = {name: model.unroll(params[name]) for name, model in members.items() if model.unroll}
        return params | found

    config = min((first, second), key=_context).config
    can_unroll = first.unroll or second.unroll
    return Model(
        init,
        hidden,
        logits,
        init_cache,
        config,
        fork=_both(first.fork, second.fork),
        unroll=can_unroll and unroll,
        rooms=first.rooms,
        resize=_both(first.resize, second.resize),
    )


def _both(one: Callable | None, two: Callable | None) -> Callable | None:
    """A function of a cache for the caches of both, None unless both have it."""
    return one and two and (lambda caches, *args: (one(caches[0], *args), two(caches[1], *args)))


def _context(model: Model) -> float:
    """The longest row of a model, infinite where it does not say."""
    longest = getattr(model.config, "max_positions", None)
    return float("inf") if longest is None else float(longest)
