"""Decoding, one token or a few at a time: caches of whole rows, caches that rows of one prompt share, unrolled layers.

The layers are unrolled, since a cache that passes through a scan is copied at every token; and so are their parameters,
since a slice of what is stacked would be.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from alignax.models import kernels, views
from alignax.models.attention import ForkedCache, LayerCache, SlotMajorCache, resized, write_front
from alignax.models.blocks import Block, apply
from alignax.models.config import TransformerConfig
from alignax.models.linear import merged
from alignax.models.rows import Rows
from alignax.types import Array, Cache, Params

SHORT = 64  # fewer new tokens are not worth compiling several loops


class Forked(NamedTuple):
    """A cache of B prompts and the R = B * group rows that continue them."""

    lengths: Int[Array, " B"]  # the shared slots that hold a prompt; position p lies in the row's slot p - length
    layers: tuple[ForkedCache, ...]


def init_cache(config: TransformerConfig, batch: int, length: int) -> tuple[LayerCache, ...]:
    """Empty slots for `length` tokens of every row, in the layout that the chosen attention reads.

    A kernel that takes whole blocks of slots gets a few more than asked for.
    """
    choice = kernels.choose(config)
    length += -length % choice.slots_multiple
    values = (batch, config.num_kv_heads, length, config.head_dim)
    keys = (batch, config.num_kv_heads, config.head_dim, length)
    kind, keys = (SlotMajorCache, values) if choice.slot_major else (LayerCache, keys)
    return tuple(kind(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype)) for _ in range(config.num_layers))


def fork(
    config: TransformerConfig, cache: tuple[LayerCache, ...], lengths: Int[Array, " B"], group: int, slots: int
) -> Forked:
    """See `Model.fork`."""
    own = init_cache(config, len(lengths) * group, slots)
    return Forked(lengths, tuple(ForkedCache(*layer) for layer in zip(cache, own)))


def rooms(config: TransformerConfig, tokens: int) -> tuple[int, ...]:
    """See `Model.rooms`: quarters, where attention reads all slots there are; a kernel reads the filled ones only.

    Slots that are not filled yet are bytes all the same: with 32 rows of the Llama of experiments/benchmarks on two CPU
    cores a step takes 2.6 ms at 64 slots, 2.95 at 128 and 3.6 at 256. Cutting a slice out of a whole cache at every
    step would cost more than it spares; a cache that grows three times is copied three times.
    """
    if tokens < SHORT or kernels.choose(config).attend is not None:
        return (tokens,)
    return tuple(-(-tokens * part // 4) for part in (1, 2, 3, 4))


def resize(config: TransformerConfig, cache: Forked, slots: int) -> Forked:
    """See `Model.resize`."""
    slots += -slots % kernels.choose(config).slots_multiple
    return cache._replace(layers=tuple(past._replace(own=resized(past.own, slots)) for past in cache.layers))


def unroll(config: TransformerConfig, params: Params) -> Params:
    """The parameters with those of the layers as a list, and with adapters merged into their kernels."""
    layers = merged(params["layers"])
    return params | {"layers": [layer(layers, index) for index in range(config.num_layers)]}


def is_unrolled(params: Params) -> bool:
    """Whether these are what `unroll` returns."""
    return isinstance(params["layers"], list)


def extend(
    config: TransformerConfig, layers: Params, x: Array, positions: Array, cache: Cache, *, prefill: bool = False
) -> tuple[Array, Cache, dict[str, Array]]:
    """Runs new tokens through all layers; their states, the cache with their slots filled, the sums of routers.

    prefill: they are whole rows, from slot 0 on, and may attend as rows in training do.
    """
    if prefill:
        seen = views.of_rows(config, positions, None, positions, prefill=True, placed=False)
        if isinstance(seen[0][1], Rows):
            return *_fill(config, layers, x, seen, cache), {}
    forked = isinstance(cache, Forked)
    slots, seen = (_forked_views if forked else _own_views)(config, positions, cache)
    if positions.shape[1] == 1 and kernels.choose(config).attend is not None:
        spans = kernels.spans(config, positions[:, 0], cache.lengths if forked else None)
        seen = [(angle, span) for (angle, _), span in zip(seen, spans)]
    filled, aux = [], []
    for index, (past, kind) in enumerate(zip(cache.layers if forked else cache, config.layer_kinds)):
        angle, visible = seen[config.kinds.index(kind)]
        x, (present, own) = apply(Block(config), layer(layers, index), x, angle, visible, None, past, slots)
        filled.append(present)
        aux.append(own)
    filled = Forked(cache.lengths, tuple(filled)) if forked else tuple(filled)
    return x, filled, jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)


def _fill(
    config: TransformerConfig, layers: Params, x: Array, seen: list, cache: tuple[LayerCache, ...]
) -> tuple[Array, tuple[LayerCache, ...]]:
    """Runs whole rows through all layers, each token over its own row alone, without a mask of it."""
    filled = []
    for index, (past, kind) in enumerate(zip(cache, config.layer_kinds)):
        angle, rows = seen[config.kinds.index(kind)]
        x, (own, _) = apply(Block(config, keep=True), layer(layers, index), x, angle, rows)
        filled.append(write_front(past, own))
    return x, tuple(filled)


def _own_views(config: TransformerConfig, positions: Array, cache: tuple[LayerCache, ...]) -> tuple[Array, list]:
    """The slot of each token, and angles and visibility of each kind of layer, in a cache of whole rows."""
    slots = cache[0].values.shape[2]
    key_positions = jnp.broadcast_to(jnp.arange(slots), (positions.shape[0], slots))
    return positions, views.of_kinds(config, positions, key_positions, views.up_to(positions, slots))


def _forked_views(config: TransformerConfig, positions: Array, cache: Forked) -> tuple[Array, list]:
    """The same where rows continue prompts: two visibilities for each kind of layer, see `attend_forked`."""
    (prompts, _, width, _), rows = cache.layers[0].shared.values.shape, positions.shape[0]
    slots = positions - jnp.repeat(cache.lengths, rows // prompts)[:, None]
    own = jnp.arange(cache.layers[0].own.values.shape[2])[None] + (positions - slots)[:, :1]
    seen = views.of_kinds(config, positions, own, own[:, None] <= positions[:, :, None])
    filled = (jnp.arange(width)[None] < cache.lengths[:, None])[:, None, None]
    by_prompt = positions.reshape(prompts, rows // prompts, -1, 1)
    shared = [
        filled if kind.window is None else filled & (jnp.arange(width)[None, None, None] > by_prompt - kind.window)
        for kind in config.kinds
    ]
    return slots, [(angle, (prompt, visible)) for prompt, (angle, visible) in zip(shared, seen)]


def layer(layers: Any, index: int) -> Any:
    """One layer's leaves, of stacked or of unrolled parameters."""
    return layers[index] if isinstance(layers, list) else jax.tree.map(lambda leaf: leaf[index], layers)
