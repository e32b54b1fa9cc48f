"""Writes tests/vectors/score/: tiny random sequence classifiers and the scores transformers computes from them.

Needs torch and transformers, so it is no test: `python tests/vectors/make_score_goldens.py`. The scores are computed by
`AutoModelForSequenceClassification.from_pretrained` on the very folder that is written, float32, eager attention, CPU.
"""

import json
import pathlib
import platform
import shutil

import numpy as np
import torch
import transformers
from make_hf_goldens import SMALL, randomise

OUT = pathlib.Path(__file__).parent / "score"
LENGTHS = (17, 9, 1)
PAD = 0
CASES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}


def write_folder(folder, name, seed):
    config_class, values = CASES[name]
    config = getattr(transformers, config_class)(**{**SMALL, "pad_token_id": PAD, "num_labels": 1, **values})
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)


def compute(folder, seed):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    rng = np.random.default_rng(seed)
    lengths = np.array(LENGTHS)
    valid = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(valid, rng.integers(3, SMALL["vocab_size"], valid.shape), PAD)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64)))
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "scores": out.logits[:, 0].numpy().astype(np.float32),
    }


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    for seed, name in enumerate(CASES):
        folder = OUT / name
        write_folder(folder, name, seed)
        np.savez_compressed(folder / "expected.npz", **compute(folder, seed))
    provenance = {
        "command": "python tests/vectors/make_score_goldens.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "expected.npz": "tokens, lengths, scores: the one label's logit of each row",
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


if __name__ == "__main__":
    main()
