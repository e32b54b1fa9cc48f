"""Any network as a `Model`: a linen module, an nnx module, or a bare `apply(params, tokens, segments) -> logits`.

A network that gives logits at once has no separate head: its states are the logits, in float32, and its head is the
identity. It trains and samples as it is, only `[B, T, V]` then exists at once. Give `head` where the network has one,
and its states are what the head takes.

None of these networks has a cache of its own, so decoding falls back on a correct and slow one: the cache is the tokens
so far, and every step runs the whole prefix again, at the cost of a forward pass of the cache's length per token. To do
better, build a `Model` by hand, with a `hidden` and an `init_cache` of its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from alignax.types import Array, Cache, Hidden, Model, Params


def from_apply(
    apply: Callable[[Params, Array, Array], Array],
    *,
    init: Callable[[Array], Params] | None = None,
    head: Callable[[Params, Array], Array] | None = None,
    config: Any = None,
) -> Model:
    """A `Model` from a causal function of tokens.

    Args:
      apply: `(params, tokens [B, T], segments [B, T]) -> logits [B, T, V]`, or states [B, T, D] with a `head`. Token i
        must depend on tokens j <= i of its own segment only (0 is padding; packed rows have several).
      init: `(key) -> params`; without one `Model.init` raises, and parameters come from elsewhere.
      head: `(params, states [..., D]) -> logits [..., V]`.
      config: kept as `Model.config`.
    """

    def states(params, tokens, segments, key):
        del key  # a bare function has no place for it
        return apply(params, tokens, segments)

    return _model(init or _no_init, states, head, config)


def from_linen(
    module: nn.Module,
    *,
    body: Callable[[Any, Array, Array], Array] | None = None,
    head: Callable[[Any, Array], Array] | None = None,
    config: Any = None,
) -> Model:
    """A `Model` from a flax.linen module, its parameters being the module's "params".

    A key given to `Model.hidden` becomes the module's "dropout" key.

    Args:
      module: called as `module(tokens, segments)`, see `from_apply`.
      body: what to call instead, `(module, tokens, segments) -> logits or states`: a method such as `Net.states`, or
        `lambda module, tokens, segments: module(tokens)`.
      head: `(module, states) -> logits`, a method such as `Net.logits`.
      config: kept as `Model.config`.

    Raises:
      ValueError: by `init`, when the module has variables other than "params" (batch statistics, a cache).
    """
    body = body or type(module).__call__

    def whole(module, tokens, segments):
        out = body(module, tokens, segments)
        return out if head is None else head(module, out)

    def init(key):
        example = jnp.zeros((1, 1), jnp.int32)
        variables = module.init(key, example, example + 1, method=whole)
        if set(variables) - {"params"}:
            raise ValueError(f"from_linen: the module has variables {sorted(variables)}; expected 'params' only")
        return variables["params"]

    def states(params, tokens, segments, key):
        rngs = None if key is None else {"dropout": key}
        return module.apply({"params": params}, tokens, segments, method=body, rngs=rngs)

    linen_head = None if head is None else lambda params, x: module.apply({"params": params}, x, method=head)
    return _model(init, states, linen_head, config)


def from_nnx(
    module: nnx.Module,
    *,
    body: Callable[[Any, Array, Array], Array] | None = None,
    head: Callable[[Any, Array], Array] | None = None,
    config: Any = None,
) -> Model:
    """A `Model` from a flax.nnx module; its parameters are the `nnx.Param`s as nested dicts.

    An nnx module holds its values: `Model.init` ignores its key and returns a copy of the parameters the module had
    when it was adapted. Everything else it holds (statistics, random streams) stays as it was then.

    Args:
      module: called as `module(tokens, segments)`, see `from_apply`.
      body, head, config: as in `from_linen`.
    """
    graph, values, rest = nnx.split(module, nnx.Param, ...)
    body = body or type(module).__call__  # pyright: ignore[reportAttributeAccessIssue]

    def init(key):
        del key
        return jax.tree.map(jnp.copy, nnx.to_pure_dict(values))

    def states(params, tokens, segments, key):
        del key  # random streams belong to the module
        return body(nnx.merge(graph, params, rest), tokens, segments)

    nnx_head = None if head is None else lambda params, x: head(nnx.merge(graph, params, rest), x)
    return _model(init, states, nnx_head, config)


def _model(init: Callable, states: Callable, head: Callable | None, config: Any) -> Model:
    def hidden(params, tokens, segments, *, positions=None, parents=None, cache=None, key=None):
        if parents is not None or (positions is not None and cache is None):
            raise ValueError("a function of tokens and segments was adapted: it takes no parents and no positions")
        segments = segments.astype(jnp.int32)
        if cache is None:
            return Hidden(states(params, tokens, segments, key), None, {})
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        cache, seen = _append(cache, tokens, segments, positions)
        out = states(params, cache, seen, key)
        return Hidden(jnp.take_along_axis(out, positions[:, :, None], axis=1), cache, {})

    def logits(params, x):
        return (x if head is None else head(params, x)).astype(jnp.float32)

    return Model(init, hidden, logits, lambda batch, length: jnp.zeros((batch, length), jnp.int32), config)


def _append(cache: Cache, tokens: Array, segments: Array, positions: Array) -> tuple[Array, Array]:
    """The cached tokens with the new ones in their slots, and the segments of all: 1 up to the last new token."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    cache = cache.at[rows, positions].set(jnp.where(segments != 0, tokens, 0))
    length = jnp.max(jnp.where(segments != 0, positions + 1, 0), axis=1)
    return cache, (jnp.arange(cache.shape[1])[None, :] < length[:, None]).astype(jnp.int32)


def _no_init(key: Array) -> Params:
    raise ValueError("from_apply: this model was made without an init; pass it parameters of your own")
