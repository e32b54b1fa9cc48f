"""The table of Hugging Face architectures: one row says which decoder it stands for, and how to read it.

A row holds the switches that the architecture always has, the key of every `TransformerConfig` field that config.json
tells, what transformers assumes for keys that are left out, and the keys that change the network in ways the decoder
does not have, with the one value that is accepted. A tensor's place is one entry of a dict from tree path to tensor.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from alignax.io import names
from alignax.io.keys import positive, whole
from alignax.io.tensors import Place

Fields = Mapping[str, Any]

KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
    "activation": "hidden_act",
}
ATTENTION_BIAS = {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
EXPERTS = {"experts_per_token": "num_experts_per_tok"}
GEMMA = {
    **KEYS,
    **ATTENTION_BIAS,
    "activation": "hidden_activation",
    "attention_scalar": "query_pre_attn_scalar",
    "logit_softcap": "final_logit_softcapping",
}
DERIVED: Mapping[str, Callable[[Fields], Any]] = {
    "num_kv_heads": lambda fields: fields["num_heads"],
    "head_dim": lambda fields: fields["hidden_size"] // fields["num_heads"],
    "initializer_range": lambda fields: 0.02,
}


class RopeKeys(NamedTuple):
    """Where config.json has the base of rotary positions, beside `rope_scaling` or inside `rope_parameters`."""

    theta: str = "rope_theta"
    fraction: str | None = None  # of a head's channels that turn; None: all
    local: str | None = None  # the base of local layers; None: the same


class Family(NamedTuple):
    """One architecture.

    flags: `TransformerConfig` fields it always has so. keys: fields that config.json tells, and their keys. derived:
    fields without a key, or with null for it, from the others. defaults: what transformers assumes for absent keys.
    only: keys with the one value that is supported. layer_keys: which of the keys about single layers it has.
    is_local: whether layer i has the window where `layer_types` does not say. interleaved: the parts of a fused tensor
    alternate head by head. prefix: what tensor names of some folders lack. aliases: other spellings of keys.
    """

    architecture: str
    model_type: str
    flags: Fields
    defaults: Mapping[str, Any]
    only: Mapping[str, Any] = MappingProxyType({})
    keys: Mapping[str, str] = MappingProxyType(KEYS)
    derived: Mapping[str, Callable[[Fields], Any]] = MappingProxyType(DERIVED)
    rope: RopeKeys | None = RopeKeys()
    layer_keys: tuple[str, ...] = ()
    is_local: Callable[[Mapping[str, Any], int], bool] = lambda values, layer: True
    tensors: Mapping[str, str | Place] = MappingProxyType(names.DECODER)
    interleaved: bool = False
    prefix: str = ""
    aliases: Mapping[str, str] = MappingProxyType({})


def _after_first(values: Mapping[str, Any], layer: int) -> bool:
    return layer >= whole(values, "max_window_layers")


def _every_other(values: Mapping[str, Any], layer: int) -> bool:
    del values
    return layer % 2 == 0


def _but_each_last(values: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % positive(values, "sliding_window_pattern") != 0


def _unrotated(values: Mapping[str, Any], layer: int) -> bool:
    return not values["no_rope_layers"][layer]


_USUAL = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0}
_QWEN = {
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN_LAYERS = ("use_sliding_window", "sliding_window", "layer_types")
_GEMMA = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attention_bias": False,
}
_GEMMA_FLAGS = {"centred_scales": True, "post_norm": True, "scale_embeddings": True}

FAMILIES = (
    Family(
        "LlamaForCausalLM",
        "llama",
        flags={},
        defaults={**_USUAL, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
        keys={**KEYS, **ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        flags={"qkv_bias": True},
        defaults={**_USUAL, **_QWEN},
        layer_keys=_QWEN_LAYERS,
        is_local=_after_first,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        flags={"qk_norm": True},
        defaults={**_USUAL, **_QWEN, "head_dim": 128, "attention_bias": False},
        keys={**KEYS, **ATTENTION_BIAS},
        layer_keys=_QWEN_LAYERS,
        is_local=_after_first,
    ),
    Family(
        "MistralForCausalLM",
        "mistral",
        flags={},
        defaults={**_USUAL, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        layer_keys=("sliding_window",),
    ),
    Family(
        "MixtralForCausalLM",
        "mixtral",
        flags={"mixture": True},
        defaults={
            **_USUAL,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        keys={**KEYS, **EXPERTS, "num_experts": "num_local_experts"},
        layer_keys=("sliding_window",),
        tensors=names.MIXTRAL,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        flags={"mixture": True, "qk_norm": True},
        defaults={
            **_USUAL,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "attention_bias": False,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        only={"decoder_sparse_step": 1, "mlp_only_layers": []},
        keys={
            **KEYS,
            **ATTENTION_BIAS,
            **EXPERTS,
            "intermediate_size": "moe_intermediate_size",
            "num_experts": "num_experts",
            "normalise_experts": "norm_topk_prob",
        },
        layer_keys=("use_sliding_window", "sliding_window"),
        tensors=names.QWEN3_MOE,
        aliases={"num_local_experts": "num_experts"},  # of transformers 5
    ),
    Family(
        "Gemma2ForCausalLM",
        "gemma2",
        flags=_GEMMA_FLAGS,
        defaults={
            **_GEMMA,
            "max_position_embeddings": 8192,
            "rope_theta": 10_000.0,
            "num_key_value_heads": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        only={"use_bidirectional_attention": False},
        keys={**GEMMA, "attention_softcap": "attn_logit_softcapping"},
        layer_keys=("sliding_window", "layer_types"),
        is_local=_every_other,
        tensors=names.GEMMA,
    ),
    Family(
        "Gemma3ForCausalLM",
        "gemma3_text",
        flags={**_GEMMA_FLAGS, "qk_norm": True},
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
            "num_key_value_heads": 4,
            "sliding_window_pattern": 6,
        },
        only={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        keys=GEMMA,
        rope=RopeKeys(local="rope_local_base_freq"),
        layer_keys=("sliding_window", "layer_types"),
        is_local=_but_each_last,
        tensors=names.GEMMA,
    ),
    Family(
        "Phi3ForCausalLM",
        "phi3",
        flags={},
        defaults={**_USUAL, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
        rope=RopeKeys(fraction="partial_rotary_factor"),
        layer_keys=("sliding_window",),
        tensors=names.PHI3,
    ),
    Family(
        "Olmo2ForCausalLM",
        "olmo2",
        flags={"pre_norm": False, "post_norm": True, "qk_norm_whole": True},
        defaults={**_USUAL, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "attention_bias": False},
        keys={**KEYS, **ATTENTION_BIAS},
        tensors=names.OLMO2,
    ),
    Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        flags={},
        defaults={
            **_USUAL,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layer_interval": 4,
        },
        keys={**KEYS, **ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        layer_keys=("use_sliding_window", "sliding_window", "layer_types", "no_rope_layers"),
        is_local=_unrotated,
    ),
    Family(
        "GPT2LMHeadModel",
        "gpt2",
        flags={
            "learned_positions": True,
            "layer_norm": True,
            "qkv_bias": True,
            "out_bias": True,
            "mlp_bias": True,
            "gated_mlp": False,
        },
        defaults={
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
        },
        only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        keys={
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "max_positions": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
            "initializer_range": "initializer_range",
            "activation": "activation_function",
        },
        derived={**DERIVED, "intermediate_size": lambda fields: 4 * fields["hidden_size"]},
        rope=None,
        tensors=names.GPT2,
        prefix="transformer.",
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        flags={"layer_norm": True, "mlp_bias": True, "gated_mlp": False},
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "tie_word_embeddings": False,
            "attention_bias": True,
            "use_parallel_residual": True,
            "rotary_emb_base": 10_000.0,
            "rotary_pct": 0.25,
        },
        keys={
            **{field: key for field, key in KEYS.items() if field not in ("num_kv_heads", "head_dim")},
            **ATTENTION_BIAS,
            "norm_eps": "layer_norm_eps",
            "parallel": "use_parallel_residual",
        },
        rope=RopeKeys(theta="rotary_emb_base", fraction="rotary_pct"),
        tensors=names.GPT_NEOX,
        interleaved=True,
    ),
)
