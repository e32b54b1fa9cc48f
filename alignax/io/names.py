"""Tensor names of each architecture: tree path -> tensor. "{}" is the layer, then the expert: such leaves are stacked.

Kernels are stored transposed, [out, in], except where a `Place` says otherwise. Paths with the same tensor are parts of
it, in this order.
"""

from alignax.io.tensors import Place


def _biases(*paths: str, names: dict[str, str]) -> dict[str, str]:
    kernels = {path: names[f"layers/{path}/kernel"] for path in paths}
    return {f"layers/{path}/bias": name.removesuffix("weight") + "bias" for path, name in kernels.items()}


def _without(names: dict[str, str], *paths: str) -> dict[str, str]:
    return {path: name for path, name in names.items() if path not in paths}


_KERNELS = {
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
}

DECODER = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    **_KERNELS,
    **_biases("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down", names=_KERNELS),
    "layers/attn/q_norm/scale": "model.layers.{}.self_attn.q_norm.weight",
    "layers/attn/k_norm/scale": "model.layers.{}.self_attn.k_norm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

OLMO2 = {
    **_without(DECODER, "layers/attn_norm/scale", "layers/mlp_norm/scale"),
    "layers/attn_post_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp_post_norm/scale": "model.layers.{}.post_feedforward_layernorm.weight",
}

GEMMA = {
    **OLMO2,
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.pre_feedforward_layernorm.weight",
}

PHI3 = {
    **DECODER,
    **{f"layers/attn/{part}/kernel": "model.layers.{}.self_attn.qkv_proj.weight" for part in "qkv"},
    **{f"layers/mlp/{part}/kernel": "model.layers.{}.mlp.gate_up_proj.weight" for part in ("gate", "up")},
}


def _layer_norms(**names: str) -> dict[str, str]:
    return {
        f"{path}/{leaf}": f"{name}.{end}"
        for path, name in names.items()
        for leaf, end in (("scale", "weight"), ("bias", "bias"))
    }


def _conv1d(path: str, name: str) -> dict[str, Place]:
    # transformers' Conv1D keeps its kernel as [in, out].
    return {
        f"layers/{path}/kernel": Place(f"{name}.weight", transposed=False),
        f"layers/{path}/bias": Place(f"{name}.bias", transposed=False),
    }


def _experts(router: str, gate: str, up: str, down: str) -> dict[str, str]:
    dense = _without(DECODER, *(path for path in DECODER if path.startswith("layers/mlp/")))
    experts = {"experts/gate/kernel": gate, "experts/up/kernel": up, "experts/down/kernel": down}
    return {**dense, **{f"layers/mlp/{path}": name for path, name in ({"router/kernel": router} | experts).items()}}


_MIXTRAL = "model.layers.{}.block_sparse_moe."
MIXTRAL = _experts(
    router=_MIXTRAL + "gate.weight",
    gate=_MIXTRAL + "experts.{}.w1.weight",
    up=_MIXTRAL + "experts.{}.w3.weight",
    down=_MIXTRAL + "experts.{}.w2.weight",
)
_QWEN3_MOE = "model.layers.{}.mlp."
QWEN3_MOE = _experts(
    router=_QWEN3_MOE + "gate.weight",
    gate=_QWEN3_MOE + "experts.{}.gate_proj.weight",
    up=_QWEN3_MOE + "experts.{}.up_proj.weight",
    down=_QWEN3_MOE + "experts.{}.down_proj.weight",
)

GPT2 = {
    "embed/embedding": "transformer.wte.weight",
    "positions/embedding": "transformer.wpe.weight",
    **_layer_norms(
        **{
            "layers/attn_norm": "transformer.h.{}.ln_1",
            "layers/mlp_norm": "transformer.h.{}.ln_2",
            "final_norm": "transformer.ln_f",
        }
    ),
    **_conv1d("attn/q", "transformer.h.{}.attn.c_attn"),
    **_conv1d("attn/k", "transformer.h.{}.attn.c_attn"),
    **_conv1d("attn/v", "transformer.h.{}.attn.c_attn"),
    **_conv1d("attn/o", "transformer.h.{}.attn.c_proj"),
    **_conv1d("mlp/up", "transformer.h.{}.mlp.c_fc"),
    **_conv1d("mlp/down", "transformer.h.{}.mlp.c_proj"),
    "head/kernel": "lm_head.weight",
}


def _linear(path: str, name: str) -> dict[str, Place]:
    return {
        f"layers/{path}/kernel": Place(f"{name}.weight", transposed=True),
        f"layers/{path}/bias": Place(f"{name}.bias", transposed=False),
    }


GPT_NEOX = {
    "embed/embedding": "gpt_neox.embed_in.weight",
    **_layer_norms(
        **{
            "layers/attn_norm": "gpt_neox.layers.{}.input_layernorm",
            "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
            "final_norm": "gpt_neox.final_layer_norm",
        }
    ),
    **_linear("attn/q", "gpt_neox.layers.{}.attention.query_key_value"),
    **_linear("attn/k", "gpt_neox.layers.{}.attention.query_key_value"),
    **_linear("attn/v", "gpt_neox.layers.{}.attention.query_key_value"),
    **_linear("attn/o", "gpt_neox.layers.{}.attention.dense"),
    **_linear("mlp/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
    **_linear("mlp/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "head/kernel": "embed_out.weight",
}
