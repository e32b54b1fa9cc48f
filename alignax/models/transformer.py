"""One decoder for Llama, Qwen 2 and Qwen 3: pre-norm blocks of grouped-query attention and a gated MLP.

A family is a `TransformerConfig`. Training and prefill scan over the layers, whose parameters are stacked along a
leading axis, so that compile time does not grow with depth. Decoding a token unrolls them instead: a cache that passes
through a scan is copied at every step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from alignax.models import rope
from alignax.models.attention import LayerCache, as_cache, attend, write, write_front
from alignax.models.segments import segment_positions, segment_visibility
from alignax.types import Array, Cache, Hidden, Model, Params

# Tensor parallel over "model": column-parallel projections into the heads and the MLP, row-parallel ones out of them,
# the vocabulary split. The leading axis of everything under "layers" is the layer.
RULES = (
    (r"(^|/)embed/embedding$", P("model", None)),
    (r"(^|/)head/kernel$", P(None, "model")),
    (r"(^|/)(q|k|v|gate|up)/kernel$", P(None, None, "model")),
    (r"(^|/)(q|k|v)/bias$", P(None, "model")),
    (r"(^|/)(o|down)/kernel$", P(None, "model", None)),
    (r".*", P()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape and the numerics of a decoder.

    head_dim is independent of hidden_size / num_heads. max_positions is the context it was trained for. dtype is what
    it computes in, param_dtype what parameters are created in. remat: None keeps every activation for the backward
    pass; a `jax.checkpoint` policy keeps only what it names, for instance
    `jax.checkpoint_policies.dots_with_no_batch_dims_saveable`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: rope.RopeScaling | None = None
    norm_eps: float = 1e-5
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Callable[..., Any] | None = None

    def __post_init__(self):
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_positions", "rope_theta", "norm_eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"TransformerConfig: {name}={getattr(self, name)}; expected a positive number")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"TransformerConfig: num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"TransformerConfig: head_dim={self.head_dim}; rotary embedding needs an even number")
        for name in ("dtype", "param_dtype"):
            object.__setattr__(
                self, name, jnp.dtype(getattr(self, name))
            )  # one spelling, so that equal configs are equal
            if not jnp.issubdtype(getattr(self, name), jnp.floating):
                raise ValueError(f"TransformerConfig: {name}={getattr(self, name)}; expected a floating-point dtype")
        if self.remat is not None and not callable(self.remat):
            raise TypeError(f"TransformerConfig: remat={self.remat!r}; expected None or a jax.checkpoint policy")


def transformer(config: TransformerConfig) -> Model:
    """The decoder that `config` describes, as a `Model`.

    Parameters are nested dicts: {"embed": {"embedding": [V, D]}, "layers": every leaf [L, ...], "final_norm":
    {"scale": [D]}, "head": {"kernel": [D, V]}}; a tied model has no "head".

    With a cache, `positions=None` means a prefill: the T tokens of every row go to slots 0 ... T - 1. Otherwise row r,
    column t is written to slot `positions[r, t]`. Either way a token sees the slots up to its own, whatever
    `segments` says: rows are contiguous, so those are filled, and padding of a ragged prefill is overwritten before
    any position reaches it.
    """
    block = Block(config)

    def init(key: Array) -> Params:
        normal = nn.initializers.normal(config.initializer_range)
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        vocabulary = (config.vocab_size, config.hidden_size)
        x = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        angle = _angles(config, jnp.zeros((1, 1), jnp.int32))
        params = {
            "embed": {"embedding": normal(embed_key, vocabulary, config.param_dtype)},
            "layers": _scanned(config).init(layers_key, x, angle, jnp.ones((1, 1, 1), bool))["params"],
            "final_norm": {"scale": jnp.ones(config.hidden_size, config.param_dtype)},
        }
        if not config.tie_embeddings:
            params["head"] = {"kernel": normal(head_key, vocabulary[::-1], config.param_dtype)}
        return params

    def hidden(
        params: Params,
        tokens: Int[Array, "B T"],
        segments: Array,
        *,
        positions: Int[Array, "B T"] | None = None,
        parents: Int[Array, "B T"] | None = None,
        cache: Cache = None,
        key: Array | None = None,
    ) -> Hidden:
        del key  # there is no dropout
        _check(tokens, segments, positions, parents, cache)
        segments = segments.astype(jnp.int32)
        x = _embed(config, params, jnp.where(segments != 0, tokens, 0))
        if cache is None:
            positions = segment_positions(segments, parents) if positions is None else positions
            visible = segment_visibility(segments, parents)
            x, _ = _scanned(config).apply({"params": params["layers"]}, x, _angles(config, positions), visible)
        elif positions is None:
            x, cache = prefill(params["layers"], x, cache)
        else:
            x, cache = extend(params["layers"], x, cache, positions)
        return Hidden(RMSNorm(config).apply({"params": params["final_norm"]}, x), cache, {})

    def prefill(layers, x, cache):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        visible = _up_to(positions, x.shape[1])
        x, own = _scanned(config, keep=True).apply({"params": layers}, x, _angles(config, positions), visible)
        return x, tuple(write_front(past, _layer(own, index)) for index, past in enumerate(cache))

    def extend(layers, x, cache, positions):
        angle, visible = _angles(config, positions), _up_to(positions, cache[0].values.shape[2])
        filled = []
        for index, past in enumerate(cache):
            x, past = block.apply({"params": _layer(layers, index)}, x, angle, visible, past, positions)
            filled.append(past)
        return x, tuple(filled)

    def logits(params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
        return jnp.matmul(states, kernel.astype(states.dtype), preferred_element_type=jnp.float32)

    def init_cache(batch: int, length: int) -> Cache:
        keys = (batch, config.num_kv_heads, config.head_dim, length)
        values = (batch, config.num_kv_heads, length, config.head_dim)
        return tuple(
            LayerCache(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype)) for _ in range(config.num_layers)
        )

    return Model(init, hidden, logits, init_cache, config)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); and its cache, when it was given one or is to `keep` its own."""

    config: TransformerConfig
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angle: Float[Array, "B T half"],
        visible: Bool[Array, "B T S"],
        past: LayerCache | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Runs the block; with `past`, new keys and values go to `slots` of it and all of it can be attended to."""
        attended, cache = Attention(self.config, name="attn")(
            RMSNorm(self.config, name="attn_norm")(x), angle, visible, past, slots
        )
        x = x + attended
        x = x + GatedMLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x))
        return x, cache if self.keep or past is not None else None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; optionally a bias on q, k, v and a norm of each q, k head."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, angle: Array, visible: Array, past: LayerCache | None, slots: Array | None
    ) -> tuple[Array, LayerCache]:
        """The attended x, and the keys and values it attended to."""
        config = self.config

        def heads(name, count):
            projected = _dense(config, count * config.head_dim, name, use_bias=config.qkv_bias)(x)
            return projected.reshape(*x.shape[:2], count, config.head_dim)

        q, k, v = heads("q", config.num_heads), heads("k", config.num_kv_heads), heads("v", config.num_kv_heads)
        if config.qk_norm:
            q, k = RMSNorm(config, name="q_norm")(q), RMSNorm(config, name="k_norm")(k)
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        cache = as_cache(k, v) if past is None else write(past, k, v, slots)
        mixed = attend(q, cache, visible)
        return _dense(config, config.hidden_size, "o")(mixed.reshape(*x.shape[:2], -1)), cache


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        config = self.config
        gate = _dense(config, config.intermediate_size, "gate")(x)
        up = _dense(config, config.intermediate_size, "up")(x)
        return _dense(config, config.hidden_size, "down")(nn.silu(gate) * up)


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32 and cast back to the compute dtype."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises `[..., N]`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(self.config.dtype)


def _dense(config: TransformerConfig, features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )


def _scanned(config: TransformerConfig, *, keep: bool = False) -> nn.Module:
    """All blocks as one: parameters, and keys and values if kept, stacked along a leading layer axis."""
    block = Block
    if config.remat is not None and not keep:
        block = nn.remat(Block, policy=config.remat, prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=config.num_layers,
    )(config, keep=keep)


def _embed(config: TransformerConfig, params: Params, tokens: Array) -> Array:
    # An id outside the vocabulary becomes NaN: loud, where clamping would quietly read another token's row.
    return jnp.take(params["embed"]["embedding"], tokens, axis=0, mode="fill").astype(config.dtype)


def _angles(config: TransformerConfig, positions: Array) -> Array:
    return rope.angles(positions, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)


def _up_to(positions: Array, length: int) -> Array:
    return jnp.arange(length)[None, None, :] <= positions[:, :, None]


def _layer(stacked: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], stacked)


def _check(tokens: Array, segments: Array, positions: Array | None, parents: Array | None, cache: Cache) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"transformer: tokens have shape {tokens.shape}; expected [B, T]")
    for name, array in (("segments", segments), ("positions", positions), ("parents", parents)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"transformer: {name} have shape {array.shape}; expected that of tokens, {tokens.shape}")
    if cache is None:
        return
    if parents is not None:
        raise ValueError("transformer: parents and a cache were given; a cached row is one contiguous sequence")
    rows, _, slots, _ = cache[0].values.shape
    if rows != tokens.shape[0] or (positions is None and slots < tokens.shape[1]):
        raise ValueError(f"transformer: a cache of {rows} rows, {slots} slots cannot take tokens of {tokens.shape}")
