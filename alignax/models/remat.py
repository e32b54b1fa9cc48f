"""What the forward pass of a decoder keeps for its backward pass, by name; the rest is computed again.

`TransformerConfig(remat=remat.keep("qkv", "attended"))`. The policies are those of `jax.checkpoint`, applied to each
block; see "Training Deep Nets with Sublinear Memory Cost", Chen et al. (https://arxiv.org/abs/1604.06174).

Splash attention marks "attended" together with its log-sum-exp, so that its forward pass need not run again; the other
kernels run again for theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from alignax.types import Array

NAMES = {  # what carries the name, and its size for every token
    "block_input": "what a block takes in, which the loop over the blocks keeps by itself: D",
    "qkv": "queries, keys and values, turned and normed: (H + 2 KV) hd",
    "attended": "what attention mixed from the values: H hd",
    "attn_out": "what attention writes into the residual stream: D",
    "mlp_inner": "what the MLP's last projection reads, activated and gated: its width",
    "mlp_out": "what the MLP writes into the residual stream: D",
}

nothing = jax.checkpoint_policies.nothing_saveable
everything = jax.checkpoint_policies.everything_saveable
dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable  # products with kernels; scores are computed again


@functools.cache  # equal arguments, the same function: configurations that keep the same compare equal
def keep(*names: str) -> Callable[..., Any]:
    """The policy that keeps what carries these names.

    Raises:
      ValueError: for a name that nothing carries.
    """
    return jax.checkpoint_policies.save_only_these_names(*_known("keep", names))


@functools.cache
def offload(*names: str, kept: tuple[str, ...] = ()) -> Callable[..., Any]:
    """The policy that moves what carries these names to the host's memory, and leaves what is `kept` on the device.

    Raises:
      ValueError: for a name that nothing carries, or that is in both.
    """
    _known("offload", names + kept)
    if both := set(names) & set(kept):
        raise ValueError(f"offload: {sorted(both)} are offloaded and kept; expected one or the other")
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(kept),
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


def named(x: Array, name: str) -> Array:
    """`x` under a name of NAMES, for a policy to find."""
    return checkpoint_name(x, *_known("named", (name,)))


def _known(function: str, names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := set(names) - NAMES.keys():
        raise ValueError(f"{function}: {sorted(unknown)}; expected some of {sorted(NAMES)}")
    return names
