"""Optimizer state in fewer bits: bfloat16, or eight bits with a scale for each block.

optax holds a first moment in bfloat16 (`mu_dtype`) and nothing in eight bits. An optimizer is wrapped instead, so that
its every moment is kept small between updates and is float32 within them:

    optimizer = leafwise.leafwise(precision.compressed(optax.adamw(1e-5), bits=8))

`alignax.leafwise` sees to it that not all of the state is float32 at once, which it would be in eight bits.

Rounding is stochastic, up or down with the probabilities that keep the mean. A second moment of decay 0.999 changes by
a thousandth of itself, which is less than half a step of bfloat16: rounded to the nearest it would never fall again.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, UInt8

from alignax.types import Array, Params

OCTAVES = 24.0  # from the largest value of a block down to the smallest that eight bits hold: a factor of 1.7e7


class Compressed(NamedTuple):
    """The state of an optimizer, its large float32 leaves in fewer bits; paths end in the parameters' paths."""

    step: Array  # int32 [], updates so far, a seed of their rounding
    values: Any  # the optimizer's state: bfloat16 or uint8 where it was float32 and large
    block_scales: Any  # the same tree with float32 [..., blocks] beside uint8 [..., N], and None elsewhere


def compressed(
    optimizer: optax.GradientTransformation, *, bits: int = 16, block: int = 128, smallest: int = 4096, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer with its float32 state in fewer bits.

    16 bits are bfloat16, a relative step of 2^-7 at most. 8 bits are a logarithm: with s the largest magnitude of a
    block, level l of L is s * 2^(-24 (L - l) / L), a relative step of 6.7 % in a block without negative values (a
    second moment, L = 255) and of 14 % in others (L = 127 and a sign). A positive number below the lowest level of the
    former is raised to it, never to 0, which would divide by Adam's epsilon.
    The idea is that of "8-bit Optimizers via Block-wise Quantization", Dettmers et al.
    (https://arxiv.org/abs/2110.02861), whose map is another one, also finer for small values than a linear one.

    Args:
      optimizer: any, its own state float32.
      bits: 16 or 8.
      block: the values of the last axis that share a scale, in eight bits; the last one may be shorter.
      smallest: leaves with fewer values stay as they are (biases, norms), and so do single numbers.
      seed: of the rounding.

    Raises:
      ValueError: for other bits, a block below 1; from `init` for a state that holds uint8 or bfloat16 by itself.
    """
    if bits not in (8, 16) or block < 1:
        raise ValueError(f"compressed: bits={bits}, block={block}; expected 16 or 8 bits and a block of at least 1")
    optimizer = optax.with_extra_args_support(optimizer)

    def shrink(state: Any, step: Array) -> Compressed:
        leaves, treedef = jax.tree.flatten(state, is_leaf=_is_none)
        found = []
        for i, x in enumerate(leaves):
            if x is None or x.dtype != jnp.float32 or x.size < smallest or not x.ndim:
                found.append((x, None))
                continue
            noise = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), i)
            found.append((round_bfloat16(noise, x), None) if bits == 16 else encode(noise, x, block))
        values, scales = (treedef.unflatten(column) for column in zip(*found, strict=True))
        return Compressed(step, values, scales)

    def init(params: Params) -> Compressed:
        state = optimizer.init(params)
        dtypes = {x.dtype for x in jax.tree.leaves(state)}
        if taken := dtypes & {jnp.dtype(jnp.uint8), jnp.dtype(jnp.bfloat16)}:
            raise ValueError(
                f"compressed: the optimizer's state holds {sorted(map(str, taken))}; expected float32, as optimizers "
                "give it for float32 parameters and without mu_dtype"
            )
        return shrink(state, jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Any, params: Params | None = None, **extra: Any):
        leaves, treedef = jax.tree.flatten(state.values, is_leaf=_is_none)
        scales = jax.tree.leaves(state.block_scales, is_leaf=_is_none)
        full = treedef.unflatten([_expand(x, scale, block) for x, scale in zip(leaves, scales, strict=True)])
        updates, full = optimizer.update(updates, full, params, **extra)
        return updates, shrink(full, state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def round_bfloat16(key: Array, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 as bfloat16, rounded up with the probability of what is cut off; what is not finite stays so.

    bfloat16 is the upper half of a float32: a random number is added to the lower half, which is then cut off.
    """
    word = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    raised = word + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x) & jnp.isfinite(kept), kept, x.astype(jnp.bfloat16))


def encode(key: Array, x: Float[Array, "... N"], block: int) -> tuple[UInt8[Array, "... N"], Float[Array, "... K"]]:
    """Eight bits for each value, and the scales of its blocks: K is N / block, rounded up.

    A scale is the largest magnitude of its block, and negative where the block holds negative values: these blocks
    spend a bit on the sign.
    """
    parts = _blocks(x, block)
    scale, signed = jnp.max(jnp.abs(parts), axis=-1), jnp.any(parts < 0, axis=-1)
    levels = jnp.where(signed, 127.0, 255.0)[..., None]
    size = jnp.abs(parts) / jnp.where(scale > 0, scale, 1.0)[..., None]
    lower = jnp.floor(levels * (1 + jnp.log2(jnp.maximum(size, 1e-30)) / OCTAVES))
    lower = jnp.clip(lower, 0, levels - 1)
    below, above = _magnitude(lower, levels), _magnitude(lower + 1, levels)
    raised = jax.random.uniform(key, size.shape) * (above - below) < size - below
    level = lower + (raised | ((lower == 0) & ~signed[..., None]))
    level = jnp.where(size > 0, level, 0.0)
    code = jnp.where(signed[..., None] & (parts < 0), level + 128, level).astype(jnp.uint8)
    code = code.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return code, jnp.where(signed, -scale, scale)


def decode(code: UInt8[Array, "... N"], scales: Float[Array, "... K"], block: int) -> Float[Array, "... N"]:
    """The float32 values of `encode`'s levels."""
    parts, signed = _blocks(code, block), (scales < 0)[..., None]
    negative = signed & (parts >= 128)
    level = jnp.where(negative, parts - 128, parts).astype(jnp.float32)
    value = jnp.abs(scales)[..., None] * _magnitude(level, jnp.where(signed, 127.0, 255.0))
    return jnp.where(negative, -value, value).reshape(*code.shape[:-1], -1)[..., : code.shape[-1]]


def _magnitude(level: Array, levels: Array) -> Array:
    return jnp.where(level > 0, jnp.exp2(OCTAVES * (level / levels - 1)), 0.0)


def _blocks(x: Array, block: int) -> Array:
    """[..., N] as [..., K, block], the last block filled with 0."""
    count = math.ceil(x.shape[-1] / block)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - x.shape[-1])])
    return x.reshape(*x.shape[:-1], count, block)


def _expand(x: Any, scales: Array | None, block: int) -> Any:
    if x is None or x.dtype not in (jnp.uint8, jnp.bfloat16):
        return x
    return x.astype(jnp.float32) if scales is None else decode(x, scales, block)


def _is_none(x: Any) -> bool:
    return x is None
