"""What a decoder is, in one record: its shape, its family's few switches, its numerics."""

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax.models import rope


class LayerKind(NamedTuple):
    """What may differ between the layers of one decoder; parameters have the same shapes in all of them."""

    window: int | None = None  # a token sees itself and the window - 1 positions before it; None: all
    rotary: bool = True  # False: the layer is told no positions
    rope_theta: float | None = None  # instead of the decoder's, and then without its scaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder. Llama needs no switch, Qwen 2 `qkv_bias`, Qwen 3 `qk_norm`; `io.architectures` has the others."""

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
    rotary_fraction: float = 1.0  # of a head's channels, the first ones; the others do not turn
    learned_positions: bool = False  # a table of max_positions rows is added to the embeddings; nothing turns
    pattern: tuple[LayerKind, ...] = (LayerKind(),)  # of the layers in turn: layer i is pattern[i % len(pattern)]
    layer_norm: bool = False  # LayerNorm with a bias instead of RMSNorm, except on queries and keys
    centred_scales: bool = False  # an RMSNorm multiplies by 1 + scale
    norm_eps: float = 1e-5
    pre_norm: bool = True  # norms what enters attention and MLP
    post_norm: bool = False  # norms what leaves them, before it is added
    parallel: bool = False  # the MLP reads what attention reads, instead of its sum with what attention wrote
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's last projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head before rotation
    qk_norm_whole: bool = False  # the same, but of all heads together
    attention_scalar: float | None = None  # scores are divided by its square root; None: head_dim
    attention_softcap: float | None = None  # scores s become c tanh(s / c)
    logit_softcap: float | None = None  # and so do logits
    gated_mlp: bool = True  # down(activation(gate(x)) * up(x)); False: down(activation(up(x)))
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    mixture: bool = False  # every MLP is a mixture of experts, gated MLPs of width intermediate_size
    num_experts: int = 8
    experts_per_token: int = 2
    normalise_experts: bool = True  # the weights of a token's experts sum to 1; False: those of all experts do
    scale_embeddings: bool = False  # times the square root of hidden_size, which is rounded to `dtype` first
    tie_embeddings: bool = False  # the head is the transposed embedding
    initializer_range: float = 0.02  # standard deviation
    dtype: Any = jnp.float32  # it computes in this
    param_dtype: Any = jnp.float32  # and creates parameters in this
    # None keeps every activation for the backward pass; a `jax.checkpoint` policy, such as those of
    # `alignax.models.remat`, keeps what it names and the rest is recomputed.
    remat: Any = None
    attention: Any = None  # an `alignax.models.flash.Choice`; None: what `choose` makes of device and rows
    decode_attention: Any = None  # an `alignax.models.kernels.Choice`; None: what `choose` makes of the device

    def __post_init__(self):
        """Refuses what no model can be."""
        for field in dataclasses.fields(self):
            _check_number(f"TransformerConfig: {field.name}", getattr(self, field.name), field.type)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        self._check_positions()
        self._check_mixture()
        if self.qk_norm and self.qk_norm_whole:
            raise ValueError("TransformerConfig: qk_norm and qk_norm_whole; expected one of them at most")
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"TransformerConfig: {name}={dtype}; expected a floating-point dtype")
            object.__setattr__(self, name, dtype)  # one spelling, so that equal configurations compare equal
        if not callable(self.activation):
            raise TypeError(f"TransformerConfig: activation={self.activation!r}; expected a function of an array")
        if self.remat is not None and not callable(self.remat):
            raise TypeError(f"TransformerConfig: remat={self.remat!r}; expected None or a jax.checkpoint policy")

    def _check_positions(self):
        unfit = self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim
        if unfit and not self.learned_positions:
            raise ValueError(
                f"TransformerConfig: head_dim={self.head_dim}; rotary embedding needs an even number"
                + f" of channels, rotary_fraction={self.rotary_fraction} of them" * (self.rotary_fraction != 1)
            )
        if not isinstance(self.pattern, tuple) or not self.pattern:
            raise ValueError(f"TransformerConfig: pattern={self.pattern!r}; expected a tuple of at least one LayerKind")
        for kind in self.pattern:
            for name, expected in LayerKind.__annotations__.items():
                _check_number(f"TransformerConfig: {name} of a layer", getattr(kind, name), expected)

    def _check_mixture(self):
        if self.mixture and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"TransformerConfig: experts_per_token={self.experts_per_token} of num_experts={self.num_experts}"
            )
        if self.mixture and (self.mlp_bias or not self.gated_mlp):
            raise ValueError("TransformerConfig: the experts of a mixture are gated MLPs without a bias")

    @property
    def rotary_dim(self) -> int:
        """The channels of a head that turn."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layer, in order of appearance."""
        return tuple(dict.fromkeys(self.layer_kinds))

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_layers))


def _check_number(name: str, value: Any, expected: Any) -> None:
    accepted = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if not {int, float} & set(accepted) or (value is None and types.NoneType in accepted):
        return
    if value is None or not value > 0:
        raise ValueError(f"{name}={value}; expected a positive number")
