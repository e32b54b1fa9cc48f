"""What `--pack` of the scripts does: short rows stand together in rows of a fixed width, in loss and batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from alignax import data, layouts, sharding
from alignax.types import Model


class Packing(NamedTuple):
    """How many members stand in a row of the network; a width of 0 packs nothing."""

    width: int = 0  # tokens of a packed row
    rows: int = 0  # packed rows of an update
    members: int = 0  # at most, of a packed row

    def loss(self, make: Callable[[Model], Any], model: Model, *, sides: int = 1) -> Any:
        """`make(model)`, a loss or statistics function, for the batches of `stream`; a pair has two sides."""
        if not self.width:
            return make(model)
        function = make(layouts.packed(model, width=self.width, members=sides * self.members))
        return None if function is None else layouts.bundled(function)

    def stream(self, batches: partial, rows: Sequence, **options: Any) -> Iterator[tuple[data.batching.Batch, Any]]:
        """What `batches(rows, **options)` gives, a partial of `data.batches`, or the same rows packed."""
        if not self.width:
            return batches(rows, **options)
        given = batches.keywords
        shape = {"batch_rows": self.rows, "width": self.width, "members": self.members, "limit": max(given["buckets"])}
        return data.packing.packed_batches(rows, given["collate"], **options, **shape)


def check(config: Any, *, sides: int = 1) -> None:
    """Refuses rows that a member of the longest kind would not fit.

    Raises:
      ValueError: with the least width.
    """
    if config.pack and config.pack < sides * config.limit:
        least = f"{sides * config.limit}, " + ("limit" if sides == 1 else f"{sides} times limit")
        raise ValueError(f"pack={config.pack}; expected 0, which packs nothing, or at least {least}={config.limit}")


def arrange(config: Any, rows: Sequence, batches: partial, mesh: jax.sharding.Mesh) -> Packing:
    """Packs so that an update sees about `batch_size` members; prints how full batches are, and packed rows."""
    shape: dict[str, Any] = {"batch_size": config.batch_size, "buckets": batches.keywords["buckets"]}
    if not config.pack:
        print("training rows:", data.batching.statistics(rows, **shape))
        return Packing()
    lengths = data.packing.token_counts(rows)
    parts = config.microbatches * sharding.row_devices(mesh)
    count = parts * math.ceil(round(config.batch_size * lengths.mean() / (0.95 * config.pack), 3) / parts)
    found = Packing(config.pack, count, data.packing.usual_members(lengths, width=config.pack))
    shape |= {"batch_rows": count, "width": config.pack, "limit": config.limit}
    print("training rows:", data.packing.statistics(rows, **shape))
    return found
