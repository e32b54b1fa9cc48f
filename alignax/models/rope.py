"""Rotary position embedding: each pair of channels (i, i + d/2) of a head turns by position * frequency_i.

Angles are computed in float32 whatever the model computes in. Pairs are laid out as Hugging Face has them (first half,
second half), not interleaved. A way to stretch the context is a small frozen dataclass that maps frequencies to
frequencies; a new one needs no change elsewhere.

See "RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al. (https://arxiv.org/abs/2104.09864).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from alignax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor`.

    See "Extending Context Window of Large Language Models via Positional Interpolation", Chen et al.
    (https://arxiv.org/abs/2306.15595).
    """

    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies, in radians per token."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths stretch by `factor`, short ones stay, those between are interpolated.

    With turns = original_max_positions * frequency / 2 pi and s = (turns - low) / (high - low), clipped to [0, 1], a
    frequency f becomes (1 - s) f / factor + s f. See "The Llama 3 Herd of Models" (https://arxiv.org/abs/2407.21783).
    """

    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The scaled frequencies, in radians per token."""
        turns = self.original_max_positions * frequencies / (2 * np.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = np.clip(kept, 0.0, 1.0)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


RopeScaling = LinearScaling | Llama3Scaling


def angles(
    positions: Int[Array, "B T"], *, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float[Array, "B T half"]:
    """position * theta^(-2 i / head_dim) for i < head_dim / 2, in radians, the frequencies scaled first if asked.

    head_dim: the channels of a head that turn, all of them in most models.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        frequencies = scaling(frequencies)
    return positions.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies, jnp.float32)[None, None, :]


def rotate(x: Float[Array, "B T H hd"], angle: Float[Array, "B T half"]) -> Float[Array, "B T H hd"]:
    """Turns the first 2 * half channels of every head of `x` by its position's angles, in float32.

    Returns `x` in its own dtype, the channels after those as they were.
    """
    half = angle.shape[-1]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned
