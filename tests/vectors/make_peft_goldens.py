"""Writes tests/vectors/peft/: adapter folders as PEFT saves them, on the bases beside them, and what it computes.

Needs torch, transformers and peft, so it is no test: `python tests/vectors/make_peft_goldens.py [CASE ...]` from the
root of the repository. The outputs are those of `PeftModel.from_pretrained` on the very folder that is written,
float32, eager attention, CPU. Adapters, b and magnitudes too, are random, so that leaving one out shows.

`python tests/vectors/make_peft_goldens.py --check BASE FOLDER OUT.npz` writes the outputs for a folder of ours.
"""

import json
import pathlib
import platform
import shutil
import sys

import numpy as np
import peft
import torch
import transformers

HERE = pathlib.Path("tests/vectors")
OUT = HERE / "peft"
LENGTHS = (9, 6)
CASES = {
    "llama": ("hf/llama2", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "qwen2_dora": (
        "hf/qwen2",
        {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    ),
    "gpt2": (
        "hf/gpt2",
        {"r": 2, "lora_alpha": 4, "target_modules": ["attn.c_proj", "mlp.c_fc"], "fan_in_fan_out": True},
    ),
    "llama_score": ("score/llama", {"r": 2, "lora_alpha": 2, "target_modules": ["k_proj"], "lora_dropout": 0.1}),
}


def scored(base):
    return base.split("/")[0] == "score"


def open_base(base):
    kind = transformers.AutoModelForSequenceClassification if scored(base) else transformers.AutoModelForCausalLM
    folder = HERE / base
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()


def write_folder(folder, base, options, seed):
    model = open_base(base)
    config = peft.LoraConfig(task_type="SEQ_CLS" if scored(base) else "CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            moved = "magnitude" in name or "modules_to_save" in name
            parameter.data = parameter.data * (1 + 0.3 * noise) if moved else 0.4 * noise
    wrapped.save_pretrained(folder)
    (folder / "README.md").unlink()  # a model card


def compute(folder, base):
    model = peft.PeftModel.from_pretrained(open_base(base), folder).eval()
    lengths = np.array(LENGTHS)
    valid = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(valid, np.random.default_rng(0).integers(3, 32, valid.shape), 0)
    with torch.no_grad():
        mask = torch.tensor(valid.astype(np.int64))
        outputs = model(input_ids=torch.tensor(tokens), attention_mask=mask).logits.numpy()
    outputs = outputs[:, 0] if scored(base) else np.where(valid[:, :, None], outputs, 0.0)
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "outputs": outputs.astype(np.float32),
    }


def main():
    for seed, (name, (base, options)) in enumerate(CASES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(folder, base, options, seed)
        np.savez_compressed(folder / "expected.npz", **compute(folder, base))
    provenance = {
        "command": "python tests/vectors/make_peft_goldens.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "numpy": np.__version__,
        "bases": {name: base for name, (base, _) in CASES.items()},
        "expected.npz": "tokens, lengths, outputs: logits (0 on padding), or scores of whole rows",
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        np.savez(sys.argv[4], **compute(sys.argv[3], sys.argv[2]))
    else:
        main()
