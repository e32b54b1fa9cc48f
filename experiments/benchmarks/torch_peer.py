"""transformers and torch as the peer of `update_gpu.py`: one update of SFT, DPO or GRPO, as trainers write it.

Logits of a micro-batch are materialised, gradients accumulate over micro-batches, layers are checkpointed, AdamW is
fused where there is a GPU. It needs torch and transformers and nothing else.
"""

import statistics
import time
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  # the peer's, not the library's
import transformers_peer
from torch.nn import functional  # pyright: ignore[reportMissingImports]


def update(
    shape: dict[str, int],
    work: str,
    *,
    length: int,
    rows: int,
    group: int,
    microbatches: int,
    repeats: int,
    param_dtype: str,
) -> dict[str, Any]:
    """Seconds of an update and the peak of the device's memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, reference = (
        transformers_peer.llama(shape, length, device, dtype=getattr(torch, param_dtype)) for _ in range(2)
    )
    model.train()
    model.gradient_checkpointing_enable()
    if work == "sft":
        del reference
        reference = None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    prompt = 0 if work == "sft" else length // 2
    tokens = torch.randint(0, shape["vocab"], (rows, length), device=device)
    advantages = torch.randn(rows // group, group, 1, device=device).reshape(rows, 1)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=param_dtype == "float32"):
            for part, chosen in zip(tokens.chunk(microbatches), advantages.chunk(microbatches), strict=True):
                (loss(work, model, reference, part, chosen, prompt) / microbatches).backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    about = {"torch": torch.__version__, "device": device}
    return {"seconds": statistics.median(seconds[2:]), "peak_bytes": peak, **about}


def loss(work: str, model: Any, reference: Any, tokens: Any, advantages: Any, prompt: int) -> Any:
    """Of the rows of a micro-batch: rows 2i and 2i + 1 are a pair."""
    logp = log_probabilities(model, tokens, prompt)
    if work == "sft":
        return -logp.mean()
    with torch.no_grad():
        ref_logp = log_probabilities(reference, tokens, prompt)
    if work == "dpo":
        ratios = (logp - ref_logp).sum(1).reshape(-1, 2)
        return -functional.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    difference = ref_logp - logp
    divergence = difference.exp() - difference - 1
    return (0.04 * divergence - (logp - logp.detach()).exp() * advantages).mean()


def log_probabilities(model: Any, tokens: Any, prompt: int) -> Any:
    """Of the tokens behind the prompt, [rows, length - max(prompt, 1)]."""
    first = max(prompt, 1)
    kept = model(tokens, logits_to_keep=tokens.shape[1] - first + 1).logits[:, :-1]
    wanted = tokens[:, first:]
    return -functional.cross_entropy(kept.flatten(0, 1).float(), wanted.flatten(), reduction="none").view(wanted.shape)
