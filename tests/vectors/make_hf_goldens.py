"""Writes tests/vectors/hf/: tiny random Hugging Face folders and the logits transformers computes from them.

Needs torch and transformers, so it is no test: `python tests/vectors/make_hf_goldens.py`. The logits are computed by
`AutoModelForCausalLM.from_pretrained` on the very folder that is written, float32, eager attention, CPU. Biases and
norm scales are moved away from their initial values, so that leaving one out shows.
"""

import json
import pathlib
import platform
import shutil

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
}
OLD_ABSENT = ("rope_parameters", "layer_types", "dtype", "transformers_version")


def randomise(model, generator):
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1.0 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.5 * noise
        else:
            parameter.data = 0.25 * noise


def write_folder(folder, name, seed):
    config_class, values, old_form = CASES[name]
    config = getattr(transformers, config_class)(**SMALL, **values)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    if old_form is not None:
        written = json.loads((folder / "config.json").read_text())
        dropped = OLD_ABSENT + tuple(k for k in ("num_key_value_heads", "head_dim") if k not in values)
        written = {k: v for k, v in written.items() if k not in dropped}
        if config_class == "Qwen3Config":
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
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits
        ids = torch.tensor(tokens[:1, :8])
        for _ in range(GREEDY):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "logits": np.where(valid[:, :, None], logits.numpy(), 0.0).astype(np.float32),
        "greedy": ids[0].numpy().astype(np.int32),
    }


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, name in enumerate(CASES):
        folder = OUT / name
        write_folder(folder, name, seed)
        np.savez_compressed(folder / "expected.npz", **compute(folder, seed))
    provenance = {
        "command": "python tests/vectors/make_hf_goldens.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "expected.npz": "tokens, lengths, logits (0 on padding), greedy: tokens[0, :8] and what argmax appends",
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
