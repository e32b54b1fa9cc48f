"""Who sees whom in whole rows, without an array of [T, T]: what such an array would be computed from."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.models.attention import LayerCache
from alignax.types import Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("segments", "parents", "positions", "kind"),
    meta_fields=("windows", "way"),
)
@dataclasses.dataclass(frozen=True)
class Rows:
    """Token i sees j <= i in its own segment and in its parent, as far back as the window of the layer reaches.

    It travels through the layers in place of a boolean mask; `alignax.models.flash.choose` has picked its `way`.
    """

    way: Callable[..., Array]  # `attend` of an `alignax.models.flash.Choice`
    windows: tuple[int | None, ...]  # of each kind of layer; None: all
    segments: Any = None  # Int or Bool [B, T]; None: one segment, which every token of the row is in
    parents: Any = None  # Int [B, T]; None: no segment continues another
    positions: Any = None  # Int [B, T]; None: positions count the columns of a segment, so that windows may count them
    kind: Any = None  # Int []: which kind of layer asks; None: there is one

    def of_kind(self, kind: Int[Array, ""]) -> "Rows":
        """What a layer of this kind sees; the kind may be traced."""
        return dataclasses.replace(self, kind=kind)

    def attend(
        self,
        queries: Float[Array, "B T H hd"],
        cache: LayerCache,
        *,
        scalar: float | None = None,
        softcap: float | None = None,
    ) -> Float[Array, "B T H hd"]:
        """`alignax.models.attention.attend` over the rows' own keys and values. Windows are static: a kind switches."""
        different = tuple(dict.fromkeys(self.windows))
        ways = [partial(self.way, window=window, scalar=scalar, softcap=softcap) for window in different]
        if len(ways) == 1:
            return ways[0](queries, cache, self)
        which = jnp.array([different.index(window) for window in self.windows])
        return jax.lax.switch(which[self.kind], ways, queries, cache, self)
