"""Writes tests/vectors/hf/: tiny random Hugging Face folders and the logits transformers computes from them.

Needs torch and transformers, so it is no test: `python tests/vectors/make_hf_goldens.py [CASE ...]`. The logits are
computed by `AutoModelForCausalLM.from_pretrained` on the very folder that is written, float32, eager attention, CPU.
Biases and norm scales are moved away from their initial values, so that leaving one out shows.
"""

import dataclasses
import json
import pathlib
import platform
import shutil
import sys

import numpy as np
import torch
import transformers

OUT = pathlib.Path(__file__).parent / "hf"
LENGTHS = (40, 23, 1)
GREEDY = 24
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
THIN = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "pad_token_id": 0}
NARROW = {**THIN, "num_key_value_heads": 1}
SHARP = {"query_pre_attn_scalar": 10}
BASE = {"rope_theta": 500.0}
HALF = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
GEMMA3 = {
    "rope_theta": 5e4,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "sliding_window_pattern": 3,
}
CASES = {
    # config.json as transformers 4 wrote it: no num_key_value_heads, no head_dim, rope_theta at the top.
    "llama2": ("LlamaConfig", {"tie_word_embeddings": False}, {"rope_theta": 10000.0, "rope_scaling": None}),
    "llama3": (
        "LlamaConfig",
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    ),
    "llama_linear": (
        "LlamaConfig",
        {"num_key_value_heads": 2, "tie_word_embeddings": True},
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    # transformers 5: everything about RoPE in rope_parameters.
    "llama3_untied": (
        "LlamaConfig",
        {"num_key_value_heads": 1, "rope_parameters": {**LLAMA3, "rope_theta": 10000.0}},
        None,
    ),
    "qwen2": (
        "Qwen2Config",
        {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6}},
        None,
    ),
    "qwen2_untied": ("Qwen2Config", {"num_key_value_heads": 4}, {"rope_theta": 1e4, "use_sliding_window": False}),
    "qwen3": (
        "Qwen3Config",
        {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
        {"rope_theta": 1e6, "rope_scaling": None},
    ),
    "qwen3_untied": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8}, None),
    # Windows of 6 tokens: rows of 40 and 23 tokens, and decoding from 8 and 5, cross their edge.
    "mistral": ("MistralConfig", {**NARROW, "sliding_window": 6}, None),
    "gemma2": (
        "Gemma2Config",
        {
            **NARROW,
            **SHARP,
            "num_hidden_layers": 3,
            "head_dim": 8,
            "sliding_window": 6,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.5,
        },
        None,
    ),
    # As transformers 4 wrote it; five layers: a period of three, and a remainder.
    "gemma3": (
        "Gemma3TextConfig",
        {**NARROW, **SHARP, "num_hidden_layers": 5, "head_dim": 8, "sliding_window": 6, **GEMMA3},
        {**GEMMA3, "sliding_window": 6},
    ),
    "phi3": ("Phi3Config", {**NARROW, "sliding_window": 6, "rope_parameters": HALF}, None),
    "olmo2": ("Olmo2Config", {**NARROW, "num_key_value_heads": 2, "attention_bias": True}, None),
    "smollm3": (
        "SmolLM3Config",
        {
            **NARROW,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "mlp_bias": True,
        },
        None,
    ),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "n_inner": 24}, None),
    "gpt_neox": ("GPTNeoXConfig", {**THIN, "rope_parameters": HALF}, None),
    # Every switch the other way; config.json as transformers 4 wrote it.
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        {**THIN, "use_parallel_residual": False, "attention_bias": False, "rope_parameters": {**HALF, **BASE}},
        {"rotary_pct": 0.5, "rotary_emb_base": 500.0},
    ),
    "qwen2_window": (
        "Qwen2Config",
        {**NARROW, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        None,
    ),
    "llama_biases": ("LlamaConfig", {**NARROW, "attention_bias": True, "mlp_bias": True}, None),
    "mixtral": (
        "MixtralConfig",
        {**NARROW, "sliding_window": 6, "num_local_experts": 5, "num_experts_per_tok": 3},
        None,
    ),
    # config.json as transformers 4 wrote it.
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**NARROW, "head_dim": 8, "moe_intermediate_size": 8, "num_experts": 6, "num_experts_per_tok": 2},
        {"num_experts": 6, "rope_theta": 10000.0, "rope_scaling": None},
    ),
}
OLD_ABSENT = ("rope_parameters", "layer_types", "dtype", "transformers_version", "num_local_experts")


def randomise(model, generator):
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ("norm" in name or ".ln_" in name) and name.endswith("weight"):
            # Gemma's scales are deviations from 1.
            parameter.data = (0.0 if "Gemma" in type(model).__name__ else 1.0) + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = 0.25 * noise


def write_folder(folder, name, seed):
    config_class, values, old_form = CASES[name]
    config_class = getattr(transformers, config_class)
    known = {field.name for field in dataclasses.fields(config_class)}
    config = config_class(**{key: value for key, value in SMALL.items() if key in known} | values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    if old_form is not None:
        written = json.loads((folder / "config.json").read_text())
        dropped = OLD_ABSENT + tuple(k for k in ("num_key_value_heads", "head_dim") if k not in values)
        written = {k: v for k, v in written.items() if k not in dropped}
        if config_class is transformers.Qwen3Config:
            written.pop("attention_bias")
        written |= old_form | {"torch_dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def compute(folder, seed):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS)
    tokens = rng.integers(3, SMALL["vocab_size"], (len(lengths), lengths.max()))
    valid = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(valid, tokens, 0)
    mask, aux = torch.tensor(valid.astype(np.int64)), {}
    with torch.no_grad():
        if hasattr(model.config, "router_aux_loss_coef"):
            out = model(input_ids=torch.tensor(tokens), attention_mask=mask, output_router_logits=True)
            aux["load_balancing"] = out.aux_loss.numpy().astype(np.float32)
        logits = model(input_ids=torch.tensor(tokens), attention_mask=mask).logits
        ids = torch.tensor(tokens[:1, :8])
        for _ in range(GREEDY):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "logits": np.where(valid[:, :, None], logits.numpy(), 0.0).astype(np.float32),
        "greedy": ids[0].numpy().astype(np.int32),
        **aux,
    }


def main():
    for seed, name in enumerate(CASES):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, name, seed)
        np.savez_compressed(folder / "expected.npz", **compute(folder, seed))
    provenance = {
        "command": "python tests/vectors/make_hf_goldens.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "expected.npz": "tokens, lengths, logits (0 on padding), greedy: tokens[0, :8] and what argmax appends; of a "
        "mixture of experts load_balancing, its auxiliary loss",
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
