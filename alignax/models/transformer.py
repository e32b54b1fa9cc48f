"""One decoder for Llama, Qwen 2 and Qwen 3, as the four pure functions of a `Model`; a family is a configuration.

Training and prefill scan over the layers, whose parameters are stacked along a leading axis, so that compile time does
not grow with depth. Decoding unrolls them: a cache that passes through a scan is copied at every token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from alignax.models import rope
from alignax.models.attention import LayerCache, write_front
from alignax.models.blocks import Block, RMSNorm, scanned
from alignax.models.config import TransformerConfig
from alignax.models.segments import segment_positions, segment_visibility
from alignax.types import Array, Cache, Hidden, Model, Params

# Tensor parallel over "model": projections into the heads and the MLP split by column, those out of them by row, the
# embedding and the head by vocabulary. The leading axis of everything under "layers" is the layer.
RULES = (
    (r"(^|/)embed/embedding$", P("model", None)),
    (r"(^|/)head/kernel$", P(None, "model")),
    (r"(^|/)(q|k|v|gate|up)/kernel$", P(None, None, "model")),
    (r"(^|/)(q|k|v)/bias$", P(None, "model")),
    (r"(^|/)(o|down)/kernel$", P(None, "model", None)),
    (r".*", P()),
)


def transformer(config: TransformerConfig) -> Model:
    """The decoder that `config` describes.

    Parameters are nested dicts: {"embed": {"embedding": [V, D]}, "layers": every leaf [L, ...], "final_norm":
    {"scale": [D]}, "head": {"kernel": [D, V]}}; a tied model has no "head".

    With a cache, `positions=None` means a prefill: the T tokens of every row go to slots 0 ... T - 1. Otherwise token t
    of row r is written to slot `positions[r, t]`. Either way a token sees every slot up to its own, whatever `segments`
    says: rows are contiguous, so those are filled, and the padding of a ragged prefill is overwritten before any
    position reaches it.
    """

    def init(key: Array) -> Params:
        normal = nn.initializers.normal(config.initializer_range)
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        example = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        angle, visible = _angles(config, jnp.zeros((1, 1), jnp.int32)), jnp.ones((1, 1, 1), bool)
        params = {
            "embed": {"embedding": normal(embed_key, (config.vocab_size, config.hidden_size), config.param_dtype)},
            "layers": scanned(config).init(layers_key, example, angle, visible)["params"],
            "final_norm": {"scale": jnp.ones(config.hidden_size, config.param_dtype)},
        }
        if not config.tie_embeddings:
            params["head"] = {"kernel": normal(head_key, (config.hidden_size, config.vocab_size), config.param_dtype)}
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
            x, _ = _apply(scanned(config), params["layers"], x, _angles(config, positions), visible)
        elif positions is None:
            x, cache = _prefill(config, params["layers"], x, cache)
        else:
            x, cache = _extend(config, params["layers"], x, positions, cache)
        return Hidden(_apply(RMSNorm(config), params["final_norm"], x), cache, {})

    def logits(params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
        return jnp.matmul(states, kernel.astype(states.dtype), preferred_element_type=jnp.float32)

    def init_cache(batch: int, length: int) -> tuple[LayerCache, ...]:
        keys = (batch, config.num_kv_heads, config.head_dim, length)
        values = (batch, config.num_kv_heads, length, config.head_dim)
        return tuple(
            LayerCache(jnp.zeros(keys, config.dtype), jnp.zeros(values, config.dtype)) for _ in range(config.num_layers)
        )

    return Model(init, hidden, logits, init_cache, config)


def _embed(config: TransformerConfig, params: Params, tokens: Array) -> Array:
    # An id outside the vocabulary becomes NaN: loud, where clamping would quietly read another token's row.
    rows = params["embed"]["embedding"].at[tokens]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(config.dtype)


def _prefill(config: TransformerConfig, layers: Params, x: Array, cache: Cache) -> tuple[Array, Cache]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    visible = _up_to(positions, x.shape[1])
    x, own = _apply(scanned(config, keep=True), layers, x, _angles(config, positions), visible)
    return x, tuple(write_front(past, _layer(own, index)) for index, past in enumerate(cache))


def _extend(config: TransformerConfig, layers: Params, x: Array, positions: Array, cache: Cache) -> tuple[Array, Cache]:
    angle, visible = _angles(config, positions), _up_to(positions, cache[0].values.shape[2])
    filled = []
    for index, past in enumerate(cache):
        x, present = _apply(Block(config), _layer(layers, index), x, angle, visible, past, positions)
        filled.append(present)
    return x, tuple(filled)


def _apply(module: nn.Module, params: Params, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _angles(config: TransformerConfig, positions: Array) -> Array:
    return rope.angles(positions, head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling)


def _up_to(positions: Array, slots: int) -> Array:
    return jnp.arange(slots)[None, None, :] <= positions[:, :, None]


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
        raise ValueError("transformer: parents and a cache were given; a cached row is one sequence without parts")
    rows, _, slots, _ = cache[0].values.shape
    if rows != tokens.shape[0] or (positions is None and slots < tokens.shape[1]):
        raise ValueError(f"transformer: a cache of {rows} rows and {slots} slots cannot take tokens of {tokens.shape}")
