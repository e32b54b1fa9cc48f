"""Rows that weigh 0, which fill a batch up to its static size."""

from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from alignax.types import Array, Mean

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


def without_empty(batch: Batch) -> tuple[Batch, Mean]:
    """The batch with weight 0 where an answer has no tokens, and the share of the rows that this leaves out.

    An empty answer is no evidence: its average log-probability is 0, the largest there is, and its log-ratio 0 too.
    `mask` is `[B, T]`, or `[B, 2, T]` of pairs, which need both sides.

    Raises:
      ValueError: for weights that are not one for each row.
    """
    mask, weights = batch.mask, batch.weights  # pyright: ignore[reportAttributeAccessIssue]
    said = jnp.all(jnp.any(mask != 0, axis=-1).reshape(mask.shape[0], -1), axis=1)
    weights = jnp.ones(said.shape, jnp.float32) if weights is None else weights
    if weights.shape != said.shape:
        raise ValueError(f"batch.mask of shape {mask.shape} has not the rows of weights of shape {weights.shape}")
    counted = weights != 0
    share = Mean(jnp.sum((counted & ~said).astype(jnp.float32)), jnp.sum(counted.astype(jnp.float32)))
    left = batch._replace(weights=jnp.where(said, weights, 0.0))  # pyright: ignore[reportAttributeAccessIssue]
    return left, share
