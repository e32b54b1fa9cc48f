"""Rows that hold a prompt once and everything that continues it: [prompt][completion 1] ... [completion G].

A mask over such a row would be mostly empty, and slower than to repeat the prompt. So it is read in three parts that
are full: the prompt by itself, each completion by itself, and the prompt by the completions, whose averages are merged
by the sums of their softmaxes (`attention.attend_forked`), forwards and backwards. Nothing but attention notices.

Where prompt and completion are long together, scores are computed a tile of queries at a time, and again in the
backward pass, as in `alignax.models.tiled`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from alignax.models import tiled
from alignax.models.attention import ForkedCache, LayerCache, attend, attend_forked, attend_rows
from alignax.models.config import TransformerConfig
from alignax.models.segments import within_window
from alignax.types import Array

LONG = 1024  # columns of a prompt and one completion from which on it goes by tiles
SIZE = 128  # queries of a tile


class Shared(NamedTuple):
    """What the tokens of such rows see: of a prompt of P columns and G completions of C columns."""

    prompt: Bool[Array, "B P P"]  # the prompt of itself
    own: Bool[Array, "BG C C"]  # each completion of itself
    of_prompt: Bool[Array, "B _ _ P"]  # the completions of the prompt, [B, G, C, P] with a 1 where all see the same

    def real(self) -> Bool[Array, "B M"]:
        """Which tokens are not padding: those that see themselves."""
        prompt, own = (jnp.diagonal(x, axis1=1, axis2=2) for x in (self.prompt, self.own))
        return jnp.concatenate([prompt, own.reshape(prompt.shape[0], -1)], axis=1)

    def attend(
        self,
        queries: Float[Array, "B M H hd"],
        cache: LayerCache,
        *,
        scalar: float | None = None,
        softcap: float | None = None,
    ) -> Float[Array, "B M H hd"]:
        """`alignax.models.attention.attend` over the rows' own keys and values."""
        options = {"scalar": scalar, "softcap": softcap}
        (rows, width, _), (parts, length, _) = self.prompt.shape, self.own.shape
        front = LayerCache(cache.keys[..., :width], cache.values[:, :, :width])
        long = width + length >= LONG
        if long:
            of_front = _by_tiles(lambda x, seen: attend(x, front, seen, **options), queries[:, :width], self.prompt)
        else:
            of_front = attend_rows(queries[:, :width], front, self.prompt, **options)
        heads, channels = cache.values.shape[1], cache.values.shape[3]
        keys = cache.keys[..., width:].reshape(rows, heads, channels, -1, length).transpose(0, 3, 1, 2, 4)
        values = cache.values[:, :, width:].reshape(rows, heads, -1, length, channels).transpose(0, 2, 1, 3, 4)
        own = LayerCache(keys.reshape(parts, *keys.shape[2:]), values.reshape(parts, *values.shape[2:]))
        behind = queries[:, width:].reshape(parts, length, *queries.shape[2:])

        def forked(x: Array, seen: Array, far: Array) -> Array:
            far = far.reshape(rows, -1, *far.shape[1:])
            return attend_forked(x, ForkedCache(front, own), (far, seen), **options)

        far = self.of_prompt.reshape(-1, *self.of_prompt.shape[2:])
        of_own = _by_tiles(forked, behind, self.own, far) if long else forked(behind, self.own, far)
        return jnp.concatenate([of_front, of_own.reshape(rows, -1, *queries.shape[2:])], axis=1)


def shared(
    config: TransformerConfig, segments: Int[Array, "B M"], positions: Int[Array, "B M"], prompt: tuple[int, int]
) -> list[Shared]:
    """What each kind of layer shows; `prompt` is (P, G), of rows of P + G * C columns."""
    (width, count), rows = prompt, segments.shape[0]

    def split(x: Array) -> tuple[Array, Array]:
        return x[:, :width], x[:, width:].reshape(rows * count, -1)

    (front, own), (front_at, own_at) = split(segments != 0), split(positions)
    of_prompt = jnp.broadcast_to(front[:, None], (rows, own_at.shape[1] * count, width))
    one = not any(kind.window for kind in config.kinds)  # else kinds differ, are stacked, and need one shape
    seen = []
    for kind in config.kinds:
        near = [within_window(_causal(x), at, at, kind.window) for x, at in ((front, front_at), (own, own_at))]
        far = within_window(of_prompt, own_at.reshape(rows, -1), front_at, kind.window)
        seen.append(Shared(near[0], near[1], front[:, None, None] if one else far.reshape(rows, count, -1, width)))
    return seen


def _by_tiles(way: Callable[..., Array], *of_queries: Array) -> Array:
    """way(*of_queries), arrays [R, T, ...], or [R, 1, ...] of what all queries have in common."""
    length = of_queries[0].shape[1]
    tiles = [tiled.in_tiles(x, SIZE) for x in of_queries if x.shape[1] == length]
    common = [x for x in of_queries if x.shape[1] != length]
    tile = jax.checkpoint(lambda own: way(*own, *common), prevent_cse=False)  # a loop already prevents it
    return tiled.in_rows(jax.lax.map(tile, tiles), length)


def _causal(real: Bool[Array, "R T"]) -> Bool[Array, "R T T"]:
    return jnp.tril(jnp.ones((real.shape[1],) * 2, bool))[None] & real[:, None]


def check(shape: tuple[int, ...], prompt: tuple[int, int], positions: Any, parents: Any, cache: Any) -> None:
    """Refuses rows that are not a prompt and equal parts."""
    width, count = prompt
    if positions is None or parents is not None or cache is not None:
        raise ValueError(f"transformer: {prompt=} wants positions, and neither parents nor a cache")
    if width < 1 or count < 1 or shape[1] <= width or (shape[1] - width) % count:
        raise ValueError(
            f"transformer: rows of {shape[1]} tokens, prompt={prompt}; expected a prompt of the first number and the "
            "second number of equal parts behind it"
        )
