"""Times decoding on a GPU against what its memory allows: a random Llama 3.2 of 1.2 B parameters in bfloat16.

    python experiments/benchmarks/decode_gpu.py --peer --json decode_gpu.json

For each batch, of distinct prompts and of groups of 8 that share one: the prefill, a decoding step, tokens per second,
and the fraction of the measured copy bandwidth at which the loop moves what it must: the weights once per step and the
filled slots of the cache once, a prompt's for its whole group, in the mean over all steps. Logits, activations and the
choice of a token are not in that floor. `--peer` times `generate` of transformers first (the same shape and dtype, sdpa
attention, prompts repeated), in a process of its own that leaves the GPU empty again. `--attention plain` shows what
the kernel brings. `--tiny` runs all of it on a CPU in seconds, and its numbers mean nothing.

The peer needs torch and transformers; nothing here does. On a GPU this has not run yet.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import timing

from alignax.models import kernels
from alignax.models.config import TransformerConfig
from alignax.sampling import generate

LLAMA = {"vocab": 128_256, "width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp": 8192}
TINY = {"vocab": 256, "width": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 128}
TINY_WORK = {"batches": [8], "prompt_length": 16, "new_tokens": 48, "repeats": 5}
ATTENTION = {"auto": None, "plain": kernels.plain(), "kernel": kernels.pallas()}


def main():
    """Parses the command line, measures, prints and writes."""
    args = parse(sys.argv[1:])
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when JAX takes the GPU, which comes later
    peer = run_peer(args) if args.peer else None  # before this process takes the GPU's memory
    report = measure(args, peer)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def parse(words: list[str]) -> argparse.Namespace:
    """The command line; with --tiny the small work stands in place of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 64, 256], help="rows (default: 8 64 256)")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8], help="rows of each prompt (default: 1 8)")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens of each prompt (default: 512)")
    parser.add_argument("--new-tokens", type=int, default=512, help="tokens of each completion (default: 512)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts (default: 3)")
    parser.add_argument("--attention", choices=ATTENTION, default="auto", help="of decoding (default: auto)")
    parser.add_argument("--peer", action="store_true", help="time transformers too")
    parser.add_argument("--peer-python", default=sys.executable, help="its interpreter (default: this one)")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, on a CPU, in seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    args = parser.parse_args(words)
    args.shape = TINY if args.tiny else LLAMA
    if args.tiny:
        vars(args).update(TINY_WORK)
    if args.new_tokens < 2:
        parser.error(f"--new-tokens {args.new_tokens}: a step is told from the prefill by two tokens at least")
    for batch, group in ((batch, group) for batch in args.batches for group in args.groups if batch % group):
        parser.error(f"--batches {batch} is not a multiple of --groups {group}")
    return args


def measure(args: argparse.Namespace, peer: dict | None = None) -> dict:
    """Every batch in groups of every size, one compiled program each, beside what the peer found."""
    model = timing.llama(
        args.shape,
        max_positions=args.prompt_length + args.new_tokens,
        dtype="bfloat16",
        rope_theta=500_000.0,
        tie_embeddings=True,
        decode_attention=ATTENTION[args.attention],
    )
    params = jax.block_until_ready(jax.jit(model.init)(jax.random.key(0)))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    report = {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "attention": str(kernels.choose(model.config)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "copy_gb_per_second": timing.bandwidth(32 if args.tiny else 1024),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "peer": peer,
        "rows": [],
    }
    for batch in args.batches:
        for group in args.groups:
            row = {
                "batch": batch,
                "group": group,
                "floor_bytes": floor_bytes(model.config, weights, args, batch, group),
            }
            try:
                row |= time_batch(args, model, params, batch, group)
                row["fraction"] = row["floor_bytes"] / row["ms_per_step"] / 1e6 / report["copy_gb_per_second"]
            except jax.errors.JaxRuntimeError as error:  # out of memory, say: the other rows count all the same
                row["failed"] = str(error)[:500]
            if peer and str(batch) in peer.get("seconds", {}):
                first, whole = peer["seconds"][str(batch)]
                row["peer"] = readings(first, whole, batch, args.new_tokens)
            report["rows"].append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return report


def time_batch(args: argparse.Namespace, model, params, batch: int, group: int) -> dict[str, float]:
    """Whole runs, and runs of a single token by the same program: `max_tokens` is data."""
    prompts = jax.random.randint(jax.random.key(1), (batch // group, args.prompt_length), 0, args.shape["vocab"])
    inputs = params, prompts, jnp.full(len(prompts), args.prompt_length), jax.random.key(2)
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=args.new_tokens, group=group))
    start = time.perf_counter()
    compiled = sample.lower(*inputs, max_tokens=jnp.int32(1)).compile()
    compiling = time.perf_counter() - start

    def seconds(tokens):
        run = lambda: jax.block_until_ready(compiled(*inputs, max_tokens=jnp.int32(tokens)))  # noqa: E731
        run()
        return timing.median_seconds(run, args.repeats)

    memory = compiled.memory_analysis()
    return readings(seconds(1), seconds(args.new_tokens), batch, args.new_tokens) | {
        "compile_seconds": compiling,
        "temporary_bytes": 0 if memory is None else memory.temp_size_in_bytes,
    }


def readings(first: float, whole: float, batch: int, new_tokens: int) -> dict[str, float]:
    """What the seconds to the first token and to the last say."""
    step = (whole - first) / (new_tokens - 1)
    return {
        "seconds": whole,
        "prefill_ms": 1e3 * (first - step),
        "ms_per_step": 1e3 * step,
        "tokens_per_second": batch * new_tokens / whole,
        "decode_tokens_per_second": batch / step,
    }


def floor_bytes(config: TransformerConfig, weights: int, args: argparse.Namespace, batch: int, group: int) -> float:
    """The bytes that a step must read, in the mean over all steps: weights, shared slots, a row's own slots.

    The rows of a prompt share its tokens but the last, which is the first that they feed; step i then sees i slots.
    """
    of_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * config.dtype.itemsize
    shared = batch // group * (args.prompt_length - 1)
    return weights + of_token * (shared + batch * (args.new_tokens + 1) / 2)


def run_peer(args: argparse.Namespace) -> dict:
    """What `transformers_peer.py` finds in a process of its own; why it found nothing, where it fails."""
    names = ("shape", "batches", "prompt_length", "new_tokens", "repeats")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "peer.json"
        work = json.dumps({name: getattr(args, name) for name in names})
        program = str(pathlib.Path(__file__).with_name("transformers_peer.py"))
        done = subprocess.run([args.peer_python, program, work, str(path)])
        return (
            json.loads(path.read_text()) if path.exists() else {"failed": f"exit status {done.returncode}, see above"}
        )


def table(report: dict) -> str:
    """The report for the eye."""
    args, copy = report["arguments"], report["copy_gb_per_second"]
    lines = [
        f"{report['device']}, jax {report['jax']}, {report['date']}; {report['parameters'] / 1e6:.1f} M parameters, "
        f"bfloat16; prompts of {args['prompt_length']}, {args['new_tokens']} new tokens; a copy moves {copy:.0f} GB/s",
        report["attention"],
        f"{'batch':>5}{'group':>6}{'prefill ms':>12}{'ms/step':>9}{'tokens/s':>10}{'floor MB':>10}{'of copy':>9}"
        f"{'temp GB':>9}{'peer ms/step':>14}{'peer tokens/s':>15}{'times':>7}",
    ]
    for row in report["rows"]:
        if "failed" in row:
            lines.append(f"{row['batch']:5}{row['group']:6}  failed: {row['failed'].splitlines()[0][:90]}")
            continue
        line = (
            f"{row['batch']:5}{row['group']:6}{row['prefill_ms']:12.1f}{row['ms_per_step']:9.2f}"
            f"{row['tokens_per_second']:10.0f}{row['floor_bytes'] / 1e6:10.1f}{row['fraction']:9.1%}"
            f"{row['temporary_bytes'] / 1e9:9.2f}"
        )
        if "peer" in row:
            times = row["tokens_per_second"] / row["peer"]["tokens_per_second"]
            line += f"{row['peer']['ms_per_step']:14.2f}{row['peer']['tokens_per_second']:15.0f}{times:7.1f}"
        lines.append(line)
    if report["peer"]:
        about = (f"{name} {value}" for name, value in report["peer"].items() if name != "seconds")
        lines.append("peer: transformers' generate, " + ", ".join(about))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
