"""What the tokens of a row see, and by which angles they turn, in each kind of layer."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Bool, Float

from alignax.models import flash, rope
from alignax.models.config import LayerKind, TransformerConfig
from alignax.models.rows import Rows
from alignax.models.segments import segment_visibility, within_window
from alignax.models.shared import Shared, shared
from alignax.types import Array


def of_rows(
    config: TransformerConfig, segments: Array, parents: Array | None, positions: Array, *, prefill: bool, placed: bool
) -> list[tuple[Float[Array, "B T half"] | None, Any]]:
    """The angles of each kind of layer, and what it sees in whole rows: a mask, or `Rows` where none is to be made.

    segments: boolean where a row is one segment. prefill: the whole row is one, filled up or not. placed: the caller
    gave the positions.
    """
    (rows, length), packed = segments.shape, segments.dtype != bool and not prefill
    shared = parents is not None
    choice = flash.choose(config, rows=rows, length=length, packed=packed, shared=shared, placed=placed)
    if choice.attend is None:
        visible = up_to(positions, length) if prefill else segment_visibility(segments.astype(jnp.int32), parents)
        return of_kinds(config, positions, positions, visible)
    own = (None if prefill else segments, parents, positions if placed or shared else None)
    return [(_angles(config, kind, positions), Rows(choice.attend, (kind.window,), *own)) for kind in config.kinds]


def of_shared(
    config: TransformerConfig, segments: Array, positions: Array, prompt: tuple[int, int]
) -> list[tuple[Float[Array, "B T half"] | None, Shared]]:
    """The angles of each kind of layer, and what it sees in rows that hold a prompt and all that continues it."""
    seen = shared(config, segments, positions, prompt)
    return [(_angles(config, kind, positions), own) for kind, own in zip(config.kinds, seen)]


def of_kinds(
    config: TransformerConfig, positions: Array, key_positions: Array, visible: Array
) -> list[tuple[Float[Array, "B T half"] | None, Bool[Array, "B T S"]]]:
    """The angles and the visibility of each kind of layer."""
    return [
        (_angles(config, kind, positions), within_window(visible, positions, key_positions, kind.window))
        for kind in config.kinds
    ]


def up_to(positions: Array, slots: int) -> Array:
    """The slots up to each token's own."""
    return jnp.arange(slots)[None, None, :] <= positions[:, :, None]


def _angles(config: TransformerConfig, kind: LayerKind, positions: Array) -> Array | None:
    if config.learned_positions:
        return None
    theta, scaling = config.rope_theta, config.rope_scaling
    if kind.rope_theta is not None:
        theta, scaling = kind.rope_theta, None
    angle = rope.angles(positions, head_dim=config.rotary_dim, theta=theta, scaling=scaling)
    return angle if kind.rotary else jnp.zeros_like(angle)  # one scan body for all: an angle of zero turns nothing
