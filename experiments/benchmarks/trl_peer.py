"""TRL as the peer of `update_peers.py`: the seconds at which its trainers end their steps.

Its trainers load the reference from the folder of the model, and take text.
"""

import tempfile
import time
from collections.abc import Callable
from typing import Any

import datasets
import torch  # pyright: ignore[reportMissingImports]  # the peer's, not the library's
import transformers
import transformers_peer
import trl  # pyright: ignore[reportMissingImports]
import words


class Stamps(transformers.TrainerCallback):
    """Notes when a step ends."""

    def __init__(self):
        """Nothing has ended yet."""
        self.found: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        """One more."""
        del args, state, control, kwargs
        self.found.append(time.perf_counter())


def dpo(shape: dict[str, int], *, pairs: int, prompt: int, completion: int, steps: int) -> list[float]:
    """Steps on pairs of so many tokens; an EOS of its own ends each side."""

    def row():
        sides = {side: " " + words.text(shape["vocab"], completion - 1) for side in ("chosen", "rejected")}
        return {"prompt": words.text(shape["vocab"], prompt)} | sides

    options = {"per_device_train_batch_size": pairs, "max_length": prompt + completion}
    return _train(trl.DPOTrainer, trl.DPOConfig, shape, [row() for _ in range(pairs * steps)], steps, options)


def grpo(
    shape: dict[str, int],
    *,
    prompts: int,
    group: int,
    prompt: int,
    completion: int,
    steps: int,
    reward: Callable[[list[int]], float],
) -> list[float]:
    """Whole steps: samples, their rewards, an update."""
    rows = [{"prompt": words.text(shape["vocab"], prompt)} for _ in range(prompts * steps)]
    options = {"per_device_train_batch_size": prompts * group, "num_generations": group, "num_iterations": 1}
    options |= {"max_completion_length": completion, "temperature": 1.0, "beta": 0.04}

    def rewards(completion_ids, **_):
        return [reward(list(row)) for row in completion_ids]

    return _train(trl.GRPOTrainer, trl.GRPOConfig, shape, rows, steps, options, reward_funcs=rewards)


def _train(trainer, config, shape, rows, steps: int, options: dict[str, Any], **extra: Any) -> list[float]:
    stamps, fixed = Stamps(), {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    fixed |= {"report_to": [], "save_strategy": "no", "logging_steps": 10**6, "max_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        transformers_peer.llama(shape, 1024, "cpu", dtype=torch.float32, tied=False).save_pretrained(folder)
        trainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=config(output_dir=folder, **fixed, **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=words.tokenizer(shape["vocab"]),
            callbacks=[stamps],
            **extra,
        ).train()
    return stamps.found
