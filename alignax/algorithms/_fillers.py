"""Rows that weigh 0, which fill a batch up to its static size."""

from typing import TypeVar

import jax.numpy as jnp

from alignax.types import Array

Batch = TypeVar("Batch")


def blank(batch: Batch) -> Batch:
    """The batch with its weightless rows all padding.

    A weight of 0 alone would not do: 0 times a NaN or an infinity in such a row is NaN, in the gradient of every row.
    """
    weights: Array | None = batch.weights  # pyright: ignore[reportAttributeAccessIssue]
    if weights is None:
        return batch
    mask, segments = batch.mask, batch.segments  # pyright: ignore[reportAttributeAccessIssue]
    counted = (weights != 0).reshape(-1, *[1] * (mask.ndim - 1))
    return batch._replace(  # pyright: ignore[reportAttributeAccessIssue]
        mask=(mask != 0) & counted, segments=jnp.where(counted, segments, 0)
    )
