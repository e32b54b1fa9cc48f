"""transformers as the peer of `decode_gpu.py` and `peers.py`: times its `generate`, in a process of its own.

    python experiments/benchmarks/transformers_peer.py '{"shape": ..., "batches": [8], ...}' OUTPUT.json

It needs torch and transformers and nothing else, and takes the GPU if torch sees one.
"""

import json
import pathlib
import statistics
import sys
import time

import torch  # pyright: ignore[reportMissingImports]  # the peer's, not the library's
import transformers


def main():
    """Reads the work from the command line, writes the seconds of each batch."""
    work, output = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = llama(work["shape"], work["prompt_length"] + work["new_tokens"], device)
    found = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device, "seconds": {}}
    for batch in work["batches"]:
        prompts = torch.randint(1, work["shape"]["vocab"], (batch, work["prompt_length"]), device=device)
        found["seconds"][batch] = [seconds(model, prompts, n, work["repeats"]) for n in (1, work["new_tokens"])]
        print(f"transformers, batch {batch}: {found['seconds'][batch]} s", file=sys.stderr, flush=True)
    output.write_text(json.dumps(found))


def llama(shape: dict[str, int], max_positions: int, device: str, *, dtype=torch.bfloat16, tied: bool = True):
    """A random Llama that never stops."""
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def seconds(model, prompts: torch.Tensor, new_tokens: int, repeats: int) -> float:
    """The median time of a call, after one that warms up."""
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new_tokens}
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        if rows.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
        assert rows.shape[1] == prompts.shape[1] + new_tokens, f"{rows.shape}: rows stopped early"
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
