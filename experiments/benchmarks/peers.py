"""Times rollouts beside the libraries one would otherwise use: the same work, one process each, in turns.

    python experiments/benchmarks/peers.py --transformers PYTHON --tunix PYTHON --prompt-length 64 --json rollouts.json

PYTHON is the interpreter of an environment that has the library (`pip install torch transformers`; `pip install
google-tunix`, Python 3.12); one that is not given is left out. The work: 4 prompts x 8 completions of 128 tokens by a
random Llama of 7.1 M parameters, float32, temperature 1, no EOS. Each process warms up once, then times a few runs;
before and after it another process times a 2048-cubed float32 matrix product. A round counts when its probes agree to
10 % and reach --least-gflops: machines that are shared change speed under one's feet.

Read on two cores of an AMD EPYC (jax 0.10.2, torch 2.13, transformers 5.23, Tunix 0.1.7, 2026-11-21): see the README's
numbers. What was learned: a prompt that is prefilled and read once for its group costs 3.5 ms a step at 512 tokens
where the repeated one costs 5.5; the layers' parameters, sliced from their stack inside the loop, were copied for every
token; one pass for the maximum and one for the sum are all that a draw needs when nothing is filtered.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

SHAPE = {"vocab": 8192, "width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 688}
PROMPTS, GROUP, NEW = 4, 8, 128


def main():
    """Parses the command line; measures in turns, or is one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", help="interpreter that has torch and transformers")
    parser.add_argument("--tunix", help="interpreter that has google-tunix")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each library (default: 3)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of a process (default: 3)")
    parser.add_argument("--least-gflops", type=float, default=400, help="a slower probe voids a round (default: 400)")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    parser.add_argument("--worker", choices=[*WORKERS, "probe"], help="be one of the timed processes")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(probe() if args.worker == "probe" else seconds(WORKERS[args.worker](args), args.repeats)))
        return
    report = measure(args)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(args) -> dict:
    """All rounds: every library once in each, between probes."""
    pythons = {"alignax": sys.executable, "transformers": args.transformers, "tunix": args.tunix}
    options = ["--prompt-length", str(args.prompt_length), "--repeats", str(args.repeats)]
    rounds = []
    for _ in range(args.rounds):
        probes, found = [run(sys.executable, "probe", [])], {}
        for name, python in pythons.items():
            if python:
                found[name] = statistics.median(run(python, name, options))
                probes.append(run(sys.executable, "probe", []))
        steady = max(probes) <= 1.1 * min(probes) and min(probes) >= args.least_gflops
        rounds.append({"seconds": found, "probe_gflops": probes, "counts": steady})
        print(f"probes {[round(x) for x in probes]}, seconds {found}, {'counts' if steady else 'void'}", flush=True)
    return {"prompt_length": args.prompt_length, "rounds": rounds}


def run(python: str, worker: str, options: list[str]) -> Any:
    """What one process prints on its last line."""
    command = [python, __file__, "--worker", worker, *options]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
    return json.loads(found.stdout.strip().splitlines()[-1])


def seconds(generate, repeats: int) -> list[float]:
    """Times of `generate()`, after one that compiles."""
    generate()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        generate()
        found.append(time.perf_counter() - start)
    return found


def probe() -> float:
    """GFLOP/s of a 2048-cubed float32 matrix product."""
    import timing

    return timing.probe()


def alignax_rollout(args):
    """One compiled program; the prompts are given once."""
    import functools

    import jax
    import jax.numpy as jnp
    import timing

    from alignax.sampling import generate

    model = timing.llama(SHAPE, max_positions=args.prompt_length + NEW)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (PROMPTS, args.prompt_length), 0, SHAPE["vocab"])
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=NEW, group=GROUP))
    inputs = params, prompts, jnp.full(PROMPTS, args.prompt_length)
    return lambda: jax.block_until_ready(sample(*inputs, jax.random.key(2), temperature=1.0))


def transformers_rollout(args):
    """`generate` of the same shape; each prompt is given once for each completion."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers_peer

    model = transformers_peer.llama(SHAPE, args.prompt_length + NEW, "cpu", dtype=torch.float32, tied=False)
    prompts = torch.randint(0, SHAPE["vocab"], (PROMPTS, args.prompt_length)).repeat_interleave(GROUP, 0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}
    return torch.no_grad()(lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **options))


def tunix_rollout(args):
    """Its sampler, which takes text: words of one token each."""
    import random

    from flax import nnx
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from tunix.generate import sampler  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import model  # pyright: ignore[reportMissingImports]

    words = {f"w{i}": i for i in range(SHAPE["vocab"] - 3)}
    words |= {token: len(words) + i for i, token in enumerate(("<pad>", "<eos>", "<bos>"))}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special)
    config = model.ModelConfig(
        num_layers=SHAPE["layers"],
        vocab_size=SHAPE["vocab"],
        embed_dim=SHAPE["width"],
        hidden_dim=SHAPE["mlp"],
        num_heads=SHAPE["heads"],
        head_dim=SHAPE["head_dim"],
        num_kv_heads=SHAPE["kv_heads"],
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    size = {"num_layers": SHAPE["layers"], "num_kv_heads": SHAPE["kv_heads"], "head_dim": SHAPE["head_dim"]}
    cache = sampler.CacheConfig(cache_size=args.prompt_length + NEW + 64, **size)
    engine = sampler.Sampler(model.Llama3(config, rngs=nnx.Rngs(0)), tokenizer, cache)
    prompts = [" ".join(f"w{random.randrange(8000)}" for _ in range(args.prompt_length - 1)) for _ in range(PROMPTS)]
    prompts = [prompt for prompt in prompts for _ in range(GROUP)]
    options = {"max_generation_steps": NEW, "max_prompt_length": args.prompt_length, "temperature": 1.0, "top_p": 1.0}

    def generate():
        tokens = engine(prompts, seed=0, eos_tokens=[SHAPE["vocab"] - 1], **options).tokens
        return [x.block_until_ready() if hasattr(x, "block_until_ready") else x for x in tokens]

    return generate


WORKERS = {"alignax": alignax_rollout, "transformers": transformers_rollout, "tunix": tunix_rollout}


def table(report: dict) -> str:
    """The medians of the rounds that count, and their ratios to alignax."""
    counted = [found for found in report["rounds"] if found["counts"]]
    lines = [
        f"{PROMPTS} prompts of {report['prompt_length']} x {GROUP} completions of {NEW} tokens; "
        f"{len(counted)} of {len(report['rounds'])} rounds count"
    ]
    for name in report["rounds"][0]["seconds"] if counted else ():
        median = statistics.median(found["seconds"][name] for found in counted)
        ratio = statistics.median(found["seconds"][name] / found["seconds"]["alignax"] for found in counted)
        lines.append(f"{name:14}{median:8.3f} s{PROMPTS * GROUP * NEW / median:10.0f} tokens/s{ratio:7.2f} x alignax")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
