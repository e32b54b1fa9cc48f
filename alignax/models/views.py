"""What the tokens of a row see, and by which angles they turn, in each kind of layer."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from alignax.models import rope
from alignax.models.config import LayerKind, TransformerConfig
from alignax.models.segments import within_window
from alignax.types import Array


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
