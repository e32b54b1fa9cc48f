"""The parts of a decoder as flax.linen modules: norms, attention, MLP, the block of them, all blocks as one scan."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from alignax.models import kernels, rope
from alignax.models.attention import (
    ForkedCache,
    LayerCache,
    as_cache,
    attend,
    attend_forked,
    attend_rows,
    spread_heads,
    write,
)
from alignax.models.config import TransformerConfig
from alignax.models.linear import Linear
from alignax.models.moe import MixtureMLP
from alignax.models.remat import named
from alignax.models.rows import Rows
from alignax.models.shared import Shared
from alignax.sharding import HEAD_AXES, ROW_AXES, constrain
from alignax.types import Array, Params

# Bool [*K, B, T, S], `Rows` where whole rows need no mask, or `Shared` where they hold a prompt and all that continues
# it; with a forked cache the two of `attend_forked`; for a kernel of one token its `Spans`.
Visible = Any


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32 and cast to the compute dtype.

    With `centred_scales` the factor is 1 + scale.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        """Normalises `x`."""
        centred = self.config.centred_scales
        first = nn.initializers.zeros if centred else nn.initializers.ones
        scale = self.param("scale", first, (x.shape[-1],), self.config.param_dtype).astype(jnp.float32)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * _as_rank(1 + scale if centred else scale, x.ndim)).astype(self.config.dtype)


class LayerNorm(nn.Module):
    """scale * (x - mean(x)) / sqrt(var(x) + eps) + bias over the last axis, in float32 and cast to the compute dtype.

    See "Layer Normalization", Ba et al. (https://arxiv.org/abs/1607.06450).
    """

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        """Normalises `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        scale, bias = (_as_rank(leaf.astype(jnp.float32), x.ndim) for leaf in (scale, bias))
        return (x * scale + bias).astype(self.config.dtype)


def norm(config: TransformerConfig, name: str | None = None) -> nn.Module:
    """The norm of the residual stream that `config` asks for."""
    return LayerNorm(config, name=name) if config.layer_norm else RMSNorm(config, name=name)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions (none where `angle` is None), and the options of `config`."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angle: Float[Array, "B T half"] | None,
        visible: Visible,
        past: LayerCache | ForkedCache | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | ForkedCache]:
        """The attended `x`, and the keys and values it attended to."""
        config = self.config

        def heads(name, count, normed):
            projected = _dense(config, count * config.head_dim, name, use_bias=config.qkv_bias)(x)
            if normed and config.qk_norm_whole:
                projected = RMSNorm(config, name=f"{name}_norm")(projected)
            projected = _by_heads(projected.reshape(*x.shape[:2], count, config.head_dim))
            if normed and config.qk_norm:
                projected = RMSNorm(config, name=f"{name}_norm")(projected)
            return rope.rotate(projected, angle) if normed and angle is not None else projected

        q, k = heads("q", config.num_heads, True), heads("k", config.num_kv_heads, True)
        v = heads("v", config.num_kv_heads, False)
        q, k, v = (named(x, "qkv") for x in (q, k, v))
        if past is None or slots is None:
            cache = as_cache(k, v)
        elif isinstance(past, ForkedCache):
            cache = ForkedCache(past.shared, write(past.own, k, v, slots))
        else:
            cache = write(past, k, v, slots)
        mixed = _mix(config, q, cache, visible, whole=past is None)
        mixed = constrain(mixed.reshape(*x.shape[:2], -1), ROW_AXES, "sequence", "tensor")
        return _dense(config, config.hidden_size, "o", use_bias=config.out_bias)(mixed), cache


def _mix(
    config: TransformerConfig,
    queries: Float[Array, "B T H hd"],
    cache: Any,  # what `visible` describes: a LayerCache or a ForkedCache
    visible: Visible,
    *,
    whole: bool,
) -> Float[Array, "B T H hd"]:
    """The attention that fits what is visible; `whole` where the cache is the rows' own keys and values and no more."""
    options = {"scalar": config.attention_scalar, "softcap": config.attention_softcap}
    cache = spread_heads(cache, queries.shape[2]) if whole else cache
    if isinstance(visible, Rows):
        return visible.attend(queries, cache, **options)
    if isinstance(visible, Shared):
        return named(visible.attend(queries, cache, **options), "attended")
    chosen = kernels.choose(config).attend
    if chosen is not None and isinstance(visible, kernels.Spans):
        return chosen(queries, cache, visible, **options)
    if isinstance(cache, ForkedCache):
        return attend_forked(queries, cache, visible, **options)
    return named((attend_rows if whole else attend)(queries, cache, visible, **options), "attended")


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each token on its own."""
        config, activation = self.config, self.config.activation

        def dense(features, name):
            return _dense(config, features, name, use_bias=config.mlp_bias)

        if config.gated_mlp:
            gate = dense(config.intermediate_size, "gate")(x)
            inner = activation(gate) * dense(config.intermediate_size, "up")(x)
        else:
            inner = activation(dense(config.intermediate_size, "up")(x))
        inner = constrain(inner, ROW_AXES, "sequence", "tensor")
        return dense(config.hidden_size, "down")(named(inner, "mlp_inner"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or as the switches of `config` have it.

    The second output holds what the scan over blocks stacks: its cache, when it was given one or is to `keep` its own,
    and the sums of a router, where the MLP is a mixture of experts and no cache is in play.
    """

    config: TransformerConfig
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angle: Float[Array, "*K B T half"] | None,
        visible: Visible,
        kind: Int[Array, ""] | None = None,
        past: LayerCache | ForkedCache | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[LayerCache | ForkedCache | None, dict[str, Array]]]:
        """Runs the block. With `past`, new keys and values go to `slots` of it, and all of it can be attended to.

        kind: which of the K kinds of layer it is; None: `angle` and `visible` have no such axis.
        """
        config, x = self.config, named(by_tokens(x), "block_input")
        if kind is not None:
            angle, visible = _pick(angle, kind), _pick(visible, kind)
        inner = norm(config, "attn_norm")(x) if config.pre_norm else x
        mixed, cache = Attention(config, name="attn")(inner, angle, visible, past, slots)
        mixed = named(mixed, "attn_out")
        mixed = norm(config, "attn_post_norm")(mixed) if config.post_norm else mixed
        read = x if config.parallel else x + mixed
        inner = norm(config, "mlp_norm")(read) if config.pre_norm else read
        kept, sums = self.keep or past is not None, {}
        if config.mixture:
            real = None if kept else _real(visible)
            changed, sums = MixtureMLP(config, name="mlp")(inner, real)
        else:
            changed = MLP(config, name="mlp")(inner)
        changed = named(changed, "mlp_out")
        changed = norm(config, "mlp_post_norm")(changed) if config.post_norm else changed
        return by_tokens(x + mixed + changed), (cache if kept else None, sums)


def scanned(config: TransformerConfig, *, keep: bool = False) -> nn.Module:
    """All blocks as one module; parameters, and the caches if kept, are stacked along a leading layer axis.

    It takes the `kind` of every layer, [L], where there are several.
    """
    block = Block
    if config.remat is not None and not keep:
        block = nn.remat(Block, policy=config.remat, prevent_cse=False)  # scan already prevents it
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
        length=config.num_layers,
    )(config, keep=keep)


def apply(module: nn.Module, params: Params, *args: Any) -> Any:
    """The module with these parameters."""
    return module.apply({"params": params}, *args)


def by_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """States on a mesh: rows over their axes, tokens over "sequence", all of a token's state in one place."""
    return constrain(x, ROW_AXES, "sequence", None)


def _by_heads(x: Float[Array, "B T heads hd"]) -> Float[Array, "B T heads hd"]:
    """What attends, on a mesh: every device has whole rows of some heads, so that any attention will do.

    Tokens that lie over "sequence" are exchanged for heads before and after, as far as heads divide: "DeepSpeed
    Ulysses: System Optimizations for Enabling Training of Extreme Long Sequence Transformer Models", Jacobs et al.
    (https://arxiv.org/abs/2309.14509).
    """
    return constrain(x, ROW_AXES, None, HEAD_AXES, None)


def _real(visible: Visible) -> Bool[Array, "B T"]:
    """Which tokens of whole rows are not padding: those that see themselves."""
    if isinstance(visible, Shared):
        return visible.real()
    return visible.segments != 0 if isinstance(visible, Rows) else jnp.diagonal(visible, axis1=1, axis2=2)


def _pick(stacked: Any, kind: Int[Array, ""]) -> Any:
    """What belongs to one kind of layer."""
    if isinstance(stacked, Rows):
        return stacked.of_kind(kind)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, kind, keepdims=False), stacked)


def _as_rank(leaf: Float[Array, " N"], rank: int) -> Float[Array, "..."]:
    return jnp.expand_dims(leaf, range(rank - 1))


def _dense(config: TransformerConfig, features: int, name: str, *, use_bias: bool = False) -> Linear:
    return Linear(config, features, use_bias, name=name)
