"""A number that says what the bits of an array are: the same on any mesh, other for any one element that changed."""

import contextlib
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_SMALL = 2**16  # elements up to which nothing is compiled


def digests(leaves: Mapping[str, Any]) -> dict[str, int]:
    """A number below 2^32 for each array, by name; two that differ in 32 bits of one element never share it.

    It is sum_i mix(bits_i + i * odd) mod 2^32 over words of 32 bits, of which wider elements have several and others
    one, and `mix`, the last step of MurmurHash3, is a bijection. Sums of integers know no order: arrays of devices are
    summed where they are, shard by shard, without a copy, but for one leaf at a time of those in the host's memory.
    """
    found = {name: _of(leaf) for name, leaf in leaves.items()}
    return {name: int(value) for name, value in jax.device_get(found).items()}


def of_tree(tree: Any) -> int:
    """The same for a whole pytree, with its structure; its leaves are arrays, numbers or texts."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = {str(place): leaf for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    found = zlib.crc32(str(structure).encode())
    for leaf in [*leaves, digests(arrays)]:
        if isinstance(leaf, np.ndarray):  # of which there may be a million: rows of tokens
            found = zlib.crc32(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes(), found)
        elif not isinstance(leaf, jax.Array):
            found = zlib.crc32(repr(leaf).encode(), found)
    return found


def _of(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not leaf.size:
        return 0
    if not isinstance(leaf, jax.Array) or (leaf.size <= _SMALL and leaf.is_fully_addressable):
        return _sum(np.asarray(leaf), np)
    if leaf.sharding.memory_kind == "pinned_host":
        leaf = jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
    mesh = getattr(leaf.sharding, "mesh", None)
    with jax.set_mesh(mesh) if isinstance(mesh, jax.sharding.Mesh) else contextlib.nullcontext():
        return _on_devices(leaf)  # wherever it lies: rollouts under way are on another mesh than that in effect


@jax.jit
def _on_devices(x: jax.Array) -> jax.Array:
    return _sum(x, jnp)


def _sum(x: Any, xp: Any) -> Any:
    words = _words(x, xp)
    index = xp.zeros((), np.uint32)
    for axis, size in enumerate(words.shape):  # row-major; an arange of the whole would not be sharded
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        along = xp.arange(size, dtype=np.uint32) * np.uint32(stride)
        index = index + along.reshape([-1 if axis == other else 1 for other in range(words.ndim)])
    mixed = words + index * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    return xp.sum(mixed, dtype=np.uint32)


def _words(x: Any, xp: Any) -> Any:
    """The bits of each element as uint32 [..., k]."""
    if x.dtype.kind == "c":
        x = xp.stack([x.real, x.imag], axis=-1)
    if x.dtype == np.bool_ or jnp.dtype(x.dtype).name in ("int4", "uint4", "int2", "uint2"):
        return x.astype(np.uint8).astype(np.uint32)[..., None]
    unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    if xp is jnp:
        bits = jax.lax.bitcast_convert_type(x, unsigned)
    else:
        bits = np.ascontiguousarray(x)[..., None].view(unsigned)
    return bits.astype(np.uint32).reshape(*x.shape, -1)
