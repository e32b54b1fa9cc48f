"""What a decoder is, in one record: its shape, its family's few switches, its numerics."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from alignax.models import rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder. Llama needs no switch, Qwen 2 and 2.5 `qkv_bias`, Qwen 3 `qk_norm`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # each serves num_heads / num_kv_heads query heads
    head_dim: int  # independent of hidden_size / num_heads
    max_positions: int = 2048  # the context it was trained for, in tokens
    rope_theta: float = 10_000.0
    rope_scaling: rope.RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation
    tie_embeddings: bool = False  # the head is the transposed embedding
    initializer_range: float = 0.02  # standard deviation
    dtype: Any = jnp.float32  # it computes in this
    param_dtype: Any = jnp.float32  # and creates parameters in this
    # None keeps every activation for the backward pass; a `jax.checkpoint` policy, such as
    # `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`, keeps what it names and the rest is recomputed.
    remat: Any = None

    def __post_init__(self):
        """Refuses what no model can be."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"TransformerConfig: {field.name}={value}; expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"TransformerConfig: head_dim={self.head_dim}; rotary embedding needs an even number")
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"TransformerConfig: {name}={dtype}; expected a floating-point dtype")
            object.__setattr__(self, name, dtype)  # one spelling, so that equal configurations compare equal
        if self.remat is not None and not callable(self.remat):
            raise TypeError(f"TransformerConfig: remat={self.remat!r}; expected None or a jax.checkpoint policy")
