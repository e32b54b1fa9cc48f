"""The table of Hugging Face architectures: what config.json says as a `TransformerConfig`, and where tensors go.

A family is one row: the flags of the decoder it stands for, what transformers assumes for keys that config.json leaves
out, and the keys that change the network in ways the decoder does not have, with the one value that is accepted.
A tensor's place is one entry of a dict from tree path to tensor name. Nothing that would change a logit is ignored.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp

from alignax.models import rope
from alignax.models.config import TransformerConfig

# Tree path -> tensor. "{}" is the layer: such leaves are stacked. Kernels are stored transposed, [out, in].
DECODER = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/q/bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/k/bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/v/bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers/attn/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attn/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}


class Family(NamedTuple):
    """One architecture. flags: its `TransformerConfig` fields; only: keys with the one value that is supported."""

    architecture: str
    model_type: str
    flags: Mapping[str, Any]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any]
    tensors: Mapping[str, str] = MappingProxyType(DECODER)


FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        flags={"qkv_bias": False, "qk_norm": False},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        only={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        flags={"qkv_bias": True, "qk_norm": False},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
        only={"hidden_act": "silu", "use_sliding_window": False},
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        flags={"qkv_bias": False, "qk_norm": True},
        defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
        only={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    ),
)

_EVERYWHERE = {"quantization_config": None, "partial_rotary_factor": 1.0}
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FolderConfig(TransformerConfig):
    """A `TransformerConfig` that remembers its folder's config.json and generation_config.json, for saving.

    `dataclasses.replace` keeps them; they take no part in comparison.
    """

    source: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)
    generation: Mapping[str, Any] = dataclasses.field(compare=False, repr=False)


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a config.json: by `architectures`, or by `model_type` where it names no architecture.

    Raises:
      ValueError: when there is no such row, or architecture and model_type contradict each other.
    """
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    for row in FAMILIES:
        named = architectures[0] == row.architecture if architectures else model_type == row.model_type
        if named and model_type not in (row.model_type, None):
            raise ValueError(f"config.json: architectures {architectures} and model_type {model_type!r} do not agree")
        if named:
            return row
    supported = ", ".join(row.architecture for row in FAMILIES)
    remote = "; code from the folder (auto_map) is never run" if "auto_map" in config else ""
    found = f"architecture {architectures[0]!r}" if architectures else f"model_type {model_type!r}"
    raise ValueError(f"config.json: {found} is not supported; supported: {supported}{remote}")


def read_config(
    source: Mapping[str, Any], generation: Mapping[str, Any], *, dtype: Any, compute_dtype: Any, remat: Any
) -> FolderConfig:
    """config.json as a `FolderConfig`.

    Raises:
      ValueError: naming the key, for what the decoder does not do or what is missing.
    """
    family = family_of(source)
    _check_only(source, family)
    values = {**family.defaults, **source}
    heads = _positive(values, "num_attention_heads")
    theta, scaling = _rope(values)
    return FolderConfig(
        vocab_size=_positive(values, "vocab_size"),
        hidden_size=_positive(values, "hidden_size"),
        intermediate_size=_positive(values, "intermediate_size"),
        num_layers=_positive(values, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_positive(values, "num_key_value_heads", heads),
        head_dim=_positive(values, "head_dim", _positive(values, "hidden_size") // heads),
        max_positions=_positive(values, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive(values, "rms_norm_eps", kind=float),
        tie_embeddings=_flag(values, "tie_word_embeddings"),
        initializer_range=_positive(values, "initializer_range", 0.02, kind=float),
        dtype=dtype if compute_dtype is None else compute_dtype,
        param_dtype=dtype,
        remat=remat,
        source=source,
        generation=generation,
        **family.flags,
    )


def write_config(config: TransformerConfig, *, dtype: Any, ids: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model: its folder's own keys, if it came from one, under what `config` says now.

    ids: bos_token_id, eos_token_id and pad_token_id for a model that came from no folder.
    """
    source = dict(config.source) if isinstance(config, FolderConfig) else {}
    family = _family_for(config, source)
    written = {
        **(source or ids),
        **family.only,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "dtype": jnp.dtype(dtype).name,
    }
    written.pop("torch_dtype", None)
    if written.get("layer_types"):
        written["layer_types"] = ["full_attention"] * config.num_layers
    if not source or _rope({**family.defaults, **source}) != (config.rope_theta, config.rope_scaling):
        written = {key: value for key, value in written.items() if key not in _ROPE_KEYS}
        # The older of the two spellings: transformers 4, vLLM and transformers 5 all read it.
        written |= {"rope_theta": config.rope_theta, "rope_scaling": _write_scaling(config.rope_scaling)}
    return written


def tensor_names(config: TransformerConfig) -> Mapping[str, str]:
    """Tree path to tensor name, for the family of `config`."""
    return _family_for(config, config.source if isinstance(config, FolderConfig) else {}).tensors


def _family_for(config: TransformerConfig, source: Mapping[str, Any]) -> Family:
    rows = [row for row in FAMILIES if all(getattr(config, key) == value for key, value in row.flags.items())]
    if not rows:
        flags = {key: getattr(config, key) for key in FAMILIES[0].flags}
        raise ValueError(f"no Hugging Face architecture in the table has {flags}; rows: {[row[0] for row in FAMILIES]}")
    return next((row for row in rows if source and row == family_of(source)), rows[0])


def _check_only(source: Mapping[str, Any], family: Family) -> None:
    for key, value in {**_EVERYWHERE, **family.only}.items():
        if source.get(key, value) not in (value, None):
            raise ValueError(
                f"config.json: {key} is {source[key]!r}; {family.architecture} is supported with {value!r}"
            )
    windowed = [kind for kind in source.get("layer_types") or [] if kind != "full_attention"]
    if windowed:
        raise ValueError(f"config.json: layer_types has {windowed[0]!r}; only 'full_attention' is supported")


def _positive(values: Mapping[str, Any], key: str, default: Any = None, *, kind: type = int) -> Any:
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"config.json: {key!r} is missing; expected a positive {kind.__name__}")
    if isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0:
        raise ValueError(f"config.json: {key} is {value!r}; expected a positive {kind.__name__}")
    return kind(value)


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}; expected true or false")
    return value


def _rope(values: Mapping[str, Any]) -> tuple[float, rope.RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new and old and new != old:
        raise ValueError(f"config.json: rope_parameters {new} and rope_scaling {old} do not agree; keep one of them")
    found = {"rope_theta": values.get("rope_theta") or 10_000.0, **(new or old or {})}
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {found['partial_rotary_factor']!r}; expected 1.0")
    if any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(f"config.json: RoPE parameters that differ by kind of layer are not supported: {new or old}")
    theta, kind = _positive(found, "rope_theta", kind=float), found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, rope.LinearScaling(factor=_positive(found, "factor", kind=float))
    if kind == "llama3":
        return theta, _llama3(values, found)
    raise ValueError(f"config.json: rope type {kind!r} is not supported; supported: 'default', 'linear', 'llama3'")


def _llama3(values: Mapping[str, Any], found: Mapping[str, Any]) -> rope.Llama3Scaling:
    key = "original_max_position_embeddings"
    # As transformers has it: a value beside the scaling wins over the one inside, and the context is the last resort.
    original = values if values.get(key) else found
    return rope.Llama3Scaling(
        factor=_positive(found, "factor", kind=float),
        low_frequency_factor=_positive(found, "low_freq_factor", kind=float),
        high_frequency_factor=_positive(found, "high_freq_factor", kind=float),
        original_max_positions=_positive(original, key, values.get("max_position_embeddings")),
    )


def _write_scaling(scaling: object) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if isinstance(scaling, rope.LinearScaling):
        return {"rope_type": "linear", "factor": scaling.factor}
    if isinstance(scaling, rope.Llama3Scaling):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    raise ValueError(f"rope_scaling {scaling!r} has no name in config.json; expected LinearScaling or Llama3Scaling")
