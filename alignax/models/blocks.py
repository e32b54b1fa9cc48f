"""The parts of a decoder as flax.linen modules: norm, attention, MLP, the block of them, and all blocks as one scan."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Bool, Float, Int

from alignax.models import rope
from alignax.models.attention import LayerCache, as_cache, attend, write
from alignax.models.config import TransformerConfig
from alignax.types import Array


class RMSNorm(nn.Module):
    """scale * x / sqrt(mean(x^2) + eps) over the last axis, in float32 and cast to the compute dtype."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "... N"]) -> Float[Array, "... N"]:
        """Normalises `x`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.config.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.config.norm_eps)
        return (x * jnp.expand_dims(scale.astype(jnp.float32), range(x.ndim - 1))).astype(self.config.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions; optionally a bias on q, k, v and a norm of each q, k head."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        angle: Float[Array, "B T half"],
        visible: Bool[Array, "B T S"],
        past: LayerCache | None = None,
        slots: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The attended `x`, and the keys and values it attended to."""
        config = self.config

        def heads(name, count):
            projected = _dense(config, count * config.head_dim, name, use_bias=config.qkv_bias)(x)
            return projected.reshape(*x.shape[:2], count, config.head_dim)

        q, k, v = heads("q", config.num_heads), heads("k", config.num_kv_heads), heads("v", config.num_kv_heads)
        if config.qk_norm:
            q, k = RMSNorm(config, name="q_norm")(q), RMSNorm(config, name="k_norm")(k)
        q, k = rope.rotate(q, angle), rope.rotate(k, angle)
        cache = as_cache(k, v) if past is None or slots is None else write(past, k, v, slots)
        mixed = attend(q, cache, visible).reshape(*x.shape[:2], -1)
        return _dense(config, config.hidden_size, "o")(mixed), cache


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Each token on its own."""
        config = self.config
        gate = _dense(config, config.intermediate_size, "gate")(x)
        up = _dense(config, config.intermediate_size, "up")(x)
        return _dense(config, config.hidden_size, "down")(nn.silu(gate) * up)


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
        """Runs the block. With `past`, new keys and values go to `slots` of it, and all of it can be attended to."""
        config = self.config
        normed = RMSNorm(config, name="attn_norm")(x)
        mixed, cache = Attention(config, name="attn")(normed, angle, visible, past, slots)
        x = x + mixed
        x = x + GatedMLP(config, name="mlp")(RMSNorm(config, name="mlp_norm")(x))
        return x, cache if self.keep or past is not None else None


def scanned(config: TransformerConfig, *, keep: bool = False) -> nn.Module:
    """All blocks as one module; parameters, and the caches if kept, are stacked along a leading layer axis."""
    block = Block
    if config.remat is not None and not keep:
        block = nn.remat(Block, policy=config.remat, prevent_cse=False)  # scan already prevents it
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
        length=config.num_layers,
    )(config, keep=keep)


def _dense(config: TransformerConfig, features: int, name: str, *, use_bias: bool = False) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.initializers.normal(config.initializer_range),
        name=name,
    )
