"""One decoder for every family, as the four pure functions of a `Model`; a family is a configuration.

Training and prefill scan over the layers, whose parameters are stacked along a leading axis, so that compile time does
not grow with depth. Where layers differ in kind (a window here, other angles there) the masks and angles of all kinds
are made once, and each layer of the scan picks those of its own. What has a cache to continue is in `decoding`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from alignax.models import decoding, shared, views
from alignax.models.attention import capped, write_front
from alignax.models.blocks import apply, by_tokens, norm, scanned
from alignax.models.config import TransformerConfig
from alignax.models.linear import matmul
from alignax.models.rows import Rows
from alignax.models.segments import segment_positions
from alignax.sharding import constrain
from alignax.types import Array, Cache, Hidden, Model, Params

# The leading axis of everything under "layers" is the layer. Over "tensor" projections into the heads and the MLP are
# split by column, those out of them by row, the embedding and the head by vocabulary; over "fsdp" all of them along
# their other axis; experts over "expert", and each like an MLP. What is small is everywhere: norms and biases of D. A
# vocabulary that does not divide leaves the splitting of its matrices to their other axis.
RULES = (
    (r"(^|/)embed/embedding$", P("tensor", "fsdp"), P(None, ("fsdp", "tensor"))),
    (r"(^|/)positions/embedding$", P(None, "fsdp")),
    (r"(^|/)head/kernel$", P("fsdp", "tensor"), P(("fsdp", "tensor"), None)),
    (r"(^|/)score/kernel$", P("fsdp", None)),
    (r"(^|/)router/kernel$", P(None, "fsdp", None)),
    (r"(^|/)experts/(gate|up)/kernel$", P(None, "expert", "fsdp", "tensor")),
    (r"(^|/)experts/down/kernel$", P(None, "expert", "tensor", "fsdp")),
    (r"(^|/)(q|k|v|gate|up)/kernel(/qvalue)?$", P(None, "fsdp", "tensor")),
    (r"(^|/)(q|k|v|gate|up)/(kernel/scale|lora_b)$", P(None, None, "tensor")),
    (r"(^|/)(q|k|v|gate|up)/(bias|lora_magnitude)$", P(None, "tensor")),
    (r"(^|/)(q|k|v|gate|up)/lora_a$", P(None, "fsdp", None)),
    (r"(^|/)(o|down)/kernel(/qvalue)?$", P(None, "tensor", "fsdp")),
    (r"(^|/)(o|down)/lora_a$", P(None, "tensor", None)),
    (r"(^|/)(o|down)/lora_b$", P(None, None, "fsdp")),
    (r"(^|/)(o|down)/(bias|lora_magnitude|kernel/scale)$", P()),
    (r"(^|/)\w*norm/(scale|bias)$", P()),
    (r"(^|/)lora_(key|rate)$", P()),
)


def transformer(config: TransformerConfig) -> Model:
    """The decoder that `config` describes.

    Parameters are nested dicts: {"embed": {"embedding": [V, D]}, "layers": every leaf [L, ...], "final_norm":
    {"scale": [D]}, "head": {"kernel": [D, V]}}; a tied model has no "head", one with learned positions has
    {"positions": {"embedding": [max_positions, D]}}, and a LayerNorm has a "bias" beside its "scale".

    With a cache, `positions=None` means a prefill: the T tokens of every row go to slots 0 ... T - 1. Otherwise token t
    of row r is written to slot `positions[r, t]`. Either way a token sees every slot up to its own, whatever `segments`
    says: rows are contiguous, so those are filled, and the padding of a ragged prefill is overwritten before any
    position reaches it. A forked cache takes the rows that continue its prompts, and `positions` count on from these.

    With `prompt=(P, G)` a row is a prompt of P columns and behind it G equal parts, each of which continues it: see
    `alignax.models.shared`, and `alignax.layouts.shared_prompt`, which makes such rows.

    `Hidden.aux` of a mixture of experts, without a cache, holds what `alignax.losses.load_balancing` reads: the sums of
    `alignax.models.moe.router_sums` for every layer, and "router_rows" [], the layers times the tokens in them.
    """

    def init(key: Array) -> Params:
        normal = nn.initializers.normal(config.initializer_range)
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        example = jnp.zeros((1, 1, config.hidden_size), config.dtype)
        one = jnp.zeros((1, 1), jnp.int32)
        seen = views.of_kinds(config, one, one, jnp.ones((1, 1, 1), bool))
        params = {
            "embed": {"embedding": normal(embed_key, (config.vocab_size, config.hidden_size), config.param_dtype)},
            "layers": scanned(config).init(layers_key, example, *_for_scan(config, seen))["params"],
            "final_norm": norm(config).init(key, example)["params"],
        }
        if config.learned_positions:
            shape = (config.max_positions, config.hidden_size)
            params["positions"] = {"embedding": normal(jax.random.fold_in(embed_key, 1), shape, config.param_dtype)}
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
        prompt: tuple[int, int] | None = None,
    ) -> Hidden:
        del key  # there is no dropout
        _check(config, tokens, segments, positions, parents, cache)
        if prompt is not None:
            shared.check(tokens.shape, prompt, positions, parents, cache)
        prefill, placed = cache is not None and positions is None, positions is not None
        if positions is None:
            positions = _in_order(tokens) if prefill else segment_positions(segments.astype(jnp.int32), parents)
        x = by_tokens(_embed(config, params, jnp.where(segments != 0, tokens, 0), positions))
        if cache is None or (prefill and not decoding.is_unrolled(params)):
            if prompt is not None:
                seen = views.of_shared(config, segments, positions, prompt)
            else:
                seen = views.of_rows(config, segments, parents, positions, prefill=prefill, placed=placed)
            blocks = scanned(config, keep=prefill)
            x, (own, aux) = apply(blocks, params["layers"], x, *_for_scan(config, seen))
            if cache is not None:
                cache = tuple(write_front(past, decoding.layer(own, index)) for index, past in enumerate(cache))
        else:
            x, cache, aux = decoding.extend(config, params["layers"], x, positions, cache, prefill=prefill)
        if aux:  # a count depends on the segments alone, so that counting needs no forward pass
            aux = {**aux, "router_rows": config.num_layers * jnp.sum(segments != 0, dtype=jnp.float32)}
        return Hidden(apply(norm(config), params["final_norm"], x), cache, aux)

    def logits(params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        kernel = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
        scores = matmul(states, kernel.astype(states.dtype), preferred_element_type=jnp.float32)
        return capped(scores, config.logit_softcap)

    names = ("init_cache", "fork", "unroll", "rooms", "resize")
    cached = {name: partial(getattr(decoding, name), config) for name in names}
    return Model(init=init, hidden=hidden, logits=logits, config=config, **cached)


def _embed(config: TransformerConfig, params: Params, tokens: Array, positions: Array) -> Array:
    x = _rows(config, params["embed"], tokens)
    if config.scale_embeddings:
        x = x * jnp.asarray(config.hidden_size**0.5, config.dtype)
    return x + _rows(config, params["positions"], positions) if config.learned_positions else x


def _rows(config: TransformerConfig, table: Params, ids: Array) -> Array:
    # An id outside the table becomes NaN: loud, where clamping would quietly read another row.
    rows = constrain(table["embedding"], "tensor", None).at[ids]
    return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False).astype(config.dtype)


def _for_scan(config: TransformerConfig, seen: list) -> tuple:
    """Angles, visibility and the kind of every layer: stacked where there are several kinds."""
    if len(seen) == 1:
        return (*seen[0], None)
    angle, visible = (_of_all_kinds(each) for each in zip(*seen))
    return angle, visible, jnp.array([config.kinds.index(kind) for kind in config.layer_kinds])


def _of_all_kinds(each: tuple) -> Any:
    if isinstance(each[0], Rows):  # what differs is static
        return dataclasses.replace(each[0], windows=tuple(window for rows in each for window in rows.windows))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _in_order(tokens: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def _check(
    config: TransformerConfig,
    tokens: Array,
    segments: Array,
    positions: Array | None,
    parents: Array | None,
    cache: Cache,
) -> None:
    if tokens.ndim != 2:
        raise ValueError(f"transformer: tokens have shape {tokens.shape}; expected [B, T]")
    for name, array in (("segments", segments), ("positions", positions), ("parents", parents)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"transformer: {name} have shape {array.shape}; expected that of tokens, {tokens.shape}")
    if cache is None:
        return
    if parents is not None:
        raise ValueError("transformer: parents and a cache were given; a cached row is one sequence without parts")
    if isinstance(cache, decoding.Forked):
        return _check_forked(tokens, positions, cache)
    rows, _, slots, _ = cache[0].values.shape
    if rows != tokens.shape[0] or (positions is None and slots < tokens.shape[1]):
        raise ValueError(f"transformer: a cache of {rows} rows and {slots} slots cannot take tokens of {tokens.shape}")
    if config.learned_positions and positions is None and tokens.shape[1] > config.max_positions:
        raise ValueError(
            f"transformer: a prompt of {tokens.shape[1]} tokens; the model has {config.max_positions} learned positions"
        )


def _check_forked(tokens: Array, positions: Array | None, cache: decoding.Forked) -> None:
    rows = cache.layers[0].own.values.shape[0]
    if positions is None or rows != tokens.shape[0]:
        raise ValueError(
            f"transformer: a forked cache of {rows} rows got tokens of {tokens.shape}, positions "
            f"{None if positions is None else positions.shape}; expected both of its rows"
        )
