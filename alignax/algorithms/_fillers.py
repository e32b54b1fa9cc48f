"""Rows that weigh 0, which fill a batch up to its static size."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from alignax.types import Array

Batch = TypeVar("Batch")


def blank(batch: Batch) -> Batch:
    """The batch with its weightless rows all padding, and nothing said about them.

    A weight of 0 alone would not do: 0 times a NaN or an infinity in such a row is NaN, in the gradient of every row.

    Raises:
      ValueError: for arrays whose rows are not those of the weights.
    """
    weights: Array | None = batch.weights  # pyright: ignore[reportAttributeAccessIssue]
    if weights is None:
        return batch
    filler = weights == 0

    def without(name: str, array: Array) -> Array:
        if array.shape[0] != filler.shape[0]:
            raise ValueError(
                f"batch.{name} of shape {array.shape} has not the rows of weights of shape {weights.shape}"
            )
        return jnp.where(filler.reshape(-1, *[1] * (array.ndim - 1)), jnp.zeros((), array.dtype), array)

    names = ("mask", "segments", "margin", "preference", "extra", "degraded")
    names += ("mismatched_mask", "mismatched_segments", "undesirable_weight")
    found = {name: part for name in names if (part := getattr(batch, name, None)) is not None}
    parts = {name: jax.tree.map(partial(without, name), part) for name, part in found.items()}
    return batch._replace(**parts)  # pyright: ignore[reportAttributeAccessIssue]
