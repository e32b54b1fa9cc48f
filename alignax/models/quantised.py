"""QLoRA's base: kernels of a byte or half a byte per weight, made floats again inside of the layer.

    base = quantised.nf4(params)                          # then as with any base: lora.init(key, base, config), ...

A quantised kernel is a `qwix.QArray` in the kernel's place: integers of its shape and float scales, one for each output
channel (int8), or for each block of 64 weights of an output channel (nf4). It is a constant; what trains are the
adapters beside it, and their gradients pass through the floats, which are made anew in the backward pass. Decoding
leaves adapters of quantised kernels unmerged. Needs the extra `quant`.

See "QLoRA: Efficient Finetuning of Quantized LLMs", Dettmers et al. (https://arxiv.org/abs/2305.14314); scales are not
quantised again.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignax.models.linear import LINEAR
from alignax.types import Array, Params


def int8(params: Params, *, targets: str = LINEAR) -> Params:
    """The parameters with the kernels that `targets` names as round(W / s), s = max |W| / 127.5 of each column.

    A weight moves by s / 2 at most.

    Raises:
      ValueError: for targets that match nothing or anything but kernels of linear projections.
    """
    return _quantised(params, targets, lambda path, kernel: _by_layer(kernel, jnp.int8, {}))


def nf4(params: Params, *, targets: str = LINEAR, block: int = 64) -> Params:
    """The parameters with the kernels that `targets` names as the nearest of 16 normal quantiles times a scale.

    The scale is max |W| of each block of `block` weights along the input axis, of one output channel.

    Raises:
      ValueError: as for `int8`, or when a kernel does not divide into blocks.
    """

    def quantise(path: str, kernel: Array) -> Any:
        if kernel.shape[-2] % block:
            raise ValueError(f"nf4: {path!r} of shape {kernel.shape} does not divide into blocks of {block} inputs")
        return _by_layer(kernel, "nf4", {0: block})

    return _quantised(params, targets, quantise)


def _quantised(params: Params, targets: str, quantise: Callable[[str, Array], Any]) -> Params:
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = [path for path in paths if re.search(targets, path)]
    unfit = [path for path in found if not re.search(LINEAR, path)]
    if not found or unfit:
        what = f"match {unfit}" if found else "match no parameter"
        raise ValueError(f"quantised: targets {targets!r} {what}; expected kernels of linear projections in layers")
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantise(_name(path), leaf) if _name(path) in found else leaf, params
    )


def _by_layer(kernel: Array, kind: Any, tiles: dict[int, int]) -> Any:
    """One layer at a time: choosing among 16 values takes 16 times the memory of what is quantised."""
    import qwix

    def one(layer: Array) -> Any:
        return qwix.quantize(layer, kind, channelwise_axes=(1,), tiled_axes=tiles)

    return jax.lax.map(one, kernel) if kernel.ndim == 3 else one(kernel)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
