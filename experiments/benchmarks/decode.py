"""Times the sampler: completions of grouped prompts by a random Llama, in one table and one JSON file.

    python experiments/benchmarks/decode.py --json decode.json

The default is 4 prompts of 64 tokens x 8 completions of 128 tokens by 7.1 M parameters in float32. Machines change
speed under one's feet, so a probe (a 2048-cubed float32 matmul) is timed before and after; a reading counts when both
agree. One compiled program serves every row of the table, and one of a single token times the start: settings are data.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from alignax.models.config import TransformerConfig
from alignax.models.transformer import transformer
from alignax.sampling import generate

SETTINGS = {
    "temperature 1": {"temperature": 1.0},
    "greedy": {"temperature": 0.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top-k 50, top-p 0.9, min-p 0.05": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def main():
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("prompts", 4, "different prompts"),
        ("group", 8, "completions of each prompt"),
        ("prompt-length", 64, "tokens of each prompt"),
        ("new-tokens", 128, "tokens of each completion"),
        ("vocab", 8192, "vocabulary"),
        ("width", 256, "model width"),
        ("layers", 4, "layers"),
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key and value heads"),
        ("head-dim", 64, "width of a head"),
        ("mlp", 688, "width of the MLP"),
        ("repeats", 5, "timed runs of each row; the median counts"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of parameters and compute")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    args = parser.parse_args()
    report = measure(args)
    print(table(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(args) -> dict:
    """Compiles once and times every setting, between two probes."""
    model = llama(args)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (args.prompts, args.prompt_length), 0, args.vocab)
    lengths = jnp.full(args.prompts, args.prompt_length)

    def timed(sample, settings):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
        run = lambda: jax.block_until_ready(sample(params, prompts, lengths, jax.random.key(2), **settings))  # noqa: E731
        run()
        return median_seconds(run, args.repeats)

    traced = []

    def static(max_new_tokens, *inputs, **settings):
        traced.append(max_new_tokens)
        return generate(model, *inputs, max_new_tokens=max_new_tokens, group=args.group, **settings)

    whole = jax.jit(functools.partial(static, args.new_tokens))
    first = jax.jit(functools.partial(static, 1))
    probes = [probe()]
    rows = {}
    for name, settings in SETTINGS.items():
        seconds, to_first = timed(whole, settings), timed(first, settings)
        steps = max(args.new_tokens - 1, 1)
        rows[name] = {
            "seconds": seconds,
            "seconds_to_first_token": to_first,
            "ms_per_step": 1e3 * (seconds - to_first) / steps,
            "tokens_per_second": args.prompts * args.group * args.new_tokens / seconds,
        }
    probes.append(probe())
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "probe_gflops": probes,
        "compiled_programs": len(traced),
        "rows": rows,
    }


def llama(args):
    """The random model that the arguments describe."""
    return transformer(
        TransformerConfig(
            vocab_size=args.vocab,
            hidden_size=args.width,
            intermediate_size=args.mlp,
            num_layers=args.layers,
            num_heads=args.heads,
            num_kv_heads=args.kv_heads,
            head_dim=args.head_dim,
            max_positions=args.prompt_length + args.new_tokens,
            dtype=args.dtype,
            param_dtype=args.dtype,
        )
    )


def probe() -> float:
    """GFLOP/s of a 2048-cubed float32 matrix product."""
    matrix = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    return 2 * 2048**3 / median_seconds(lambda: product(matrix, matrix).block_until_ready(), 7) / 1e9


def median_seconds(run, repeats: int) -> float:
    """The median time of a call."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def table(report: dict) -> str:
    """The report for the eye."""
    args = report["arguments"]
    before, after = report["probe_gflops"]
    lines = [
        f"{report['device']}, jax {report['jax']}, {report['parameters'] / 1e6:.1f} M parameters, {args['dtype']}; "
        f"{args['prompts']} prompts of {args['prompt_length']} x {args['group']} completions of {args['new_tokens']}",
        f"probe {before:.0f} GFLOP/s before, {after:.0f} after; {report['compiled_programs']} programs compiled",
        f"{'settings':34}{'seconds':>9}{'to first':>10}{'ms/step':>9}{'tokens/s':>10}",
    ]
    for name, row in report["rows"].items():
        lines.append(
            f"{name:34}{row['seconds']:9.3f}{row['seconds_to_first_token']:10.3f}{row['ms_per_step']:9.2f}"
            f"{row['tokens_per_second']:10.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
