"""Times the sampler: completions of grouped prompts by a random Llama, in two tables and one JSON file.

    python experiments/benchmarks/decode.py --prompt-length 512 --json decode.json

The default is 4 prompts of 64 tokens x 8 completions of 128 tokens by 7.1 M parameters in float32. Machines change
speed under one's feet, so a probe (a 2048-cubed float32 matrix product) is timed before and after; a reading counts
when both agree. One compiled program serves every row of the first table, and one of a single token times the start:
settings are data.

The second table holds a step against two floors: the bytes that it must move (weights once, prompts once for their
group, a row's own keys and values once, half full on average) at the bandwidth of a pass over a large array, and the
operations that it must do at the probe's rate. One row moves its bytes at 77 % of that bandwidth (two cores, 62 GB/s,
450 GFLOP/s). At 32 rows a step takes 3 ms where the floors are 0.5 and 0.7: a product of 32 rows with [256, 688] runs
at 170 GFLOP/s and the head at 370, the 64 small products of attention (two query heads each) take 1 ms with all that
is around them, and each of the 165 kernels of a step costs some microseconds to start.

Its last line compares the memory of the compiled program with that of the same rows as prompts of their own.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import timing

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
    model = timing.llama(shape(args), max_positions=args.prompt_length + args.new_tokens, dtype=args.dtype)
    params = jax.jit(model.init)(jax.random.key(0))
    probes, traced = [timing.probe()], []

    def static(prompts, group, max_new_tokens):
        def sample(*inputs, **settings):
            traced.append(max_new_tokens)
            return generate(model, *inputs, max_new_tokens=max_new_tokens, group=group, **settings)

        tokens = jax.random.randint(jax.random.key(1), (prompts, args.prompt_length), 0, args.vocab)
        return jax.jit(sample), (params, tokens, jnp.full(prompts, args.prompt_length), jax.random.key(2))

    def timed(programs, settings):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **settings}
        runs = [lambda p=p, x=x: jax.block_until_ready(p(*x, **settings)) for p, x in programs]
        for run in runs:
            run()
        seconds, to_first = (timing.median_seconds(run, args.repeats) for run in runs)
        return seconds, to_first, (seconds - to_first) / max(args.new_tokens - 1, 1)

    programs = [static(args.prompts, args.group, count) for count in (args.new_tokens, 1)]
    rows = {}
    for name, settings in SETTINGS.items():
        seconds, to_first, step = timed(programs, settings)
        tokens = args.prompts * args.group * args.new_tokens
        rows[name] = {"seconds": seconds, "first": to_first, "step": step, "tokens_per_second": tokens / seconds}
    compiled = len(traced)
    copied, floors = timing.bandwidth(), {}
    for prompts, group in ((1, 1), (1, args.group), (args.prompts, args.group), (4 * args.prompts, args.group)):
        _, _, step = timed([static(prompts, group, count) for count in (args.new_tokens, 1)], {})
        moved, operations = floor(model, params, args, prompts, group)
        floors[f"{prompts} x {group}"] = {"step": step, "bytes": moved, "operations": operations}
    probes.append(timing.probe())
    repeated = static(args.prompts * args.group, 1, args.new_tokens)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "arguments": {name: value for name, value in vars(args).items() if name != "json"},
        "probe_gflops": probes,
        "copy_gigabytes_per_second": copied,
        "compiled_programs": compiled,
        "rows": rows,
        "floors": floors,
        "memory": {name: memory(*program) for name, program in (("grouped", programs[0]), ("repeated", repeated))},
    }


def shape(args) -> dict:
    """What the arguments say of the model."""
    return {name: getattr(args, name) for name in ("vocab", "width", "layers", "heads", "kv_heads", "head_dim", "mlp")}


def floor(model, params, args, prompts: int, group: int) -> tuple[int, int]:
    """Bytes and operations that a step cannot do without: weights and filled cache once, each product once."""
    multiplied = [leaf for name, leaf in params.items() if name != "embed"]
    weights = jax.tree.leaves(multiplied)
    cache = jax.eval_shape(lambda: model.init_cache(1, 256))
    slot = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) // 256
    filled = prompts * args.prompt_length + prompts * group * args.new_tokens // 2
    operations = 2 * prompts * group * sum(leaf.size for leaf in weights)
    return sum(leaf.nbytes for leaf in weights) + slot * filled, operations


def memory(program, inputs) -> int:
    """Bytes beside the inputs, at the peak as XLA plans it: temporaries and results."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    found = program.lower(*inputs, **settings).compile().memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


def table(report: dict) -> str:
    """The report for the eye."""
    args = report["arguments"]
    before, after = report["probe_gflops"]
    copied = report["copy_gigabytes_per_second"]
    lines = [
        f"{report['device']}, jax {report['jax']}, {report['parameters'] / 1e6:.1f} M parameters, {args['dtype']}; "
        f"{args['prompts']} prompts of {args['prompt_length']} x {args['group']} completions of {args['new_tokens']}",
        f"probe {before:.0f} GFLOP/s before, {after:.0f} after; copy {copied:.0f} GB/s; "
        f"{report['compiled_programs']} programs compiled for the first table",
        f"{'settings':34}{'seconds':>9}{'to first':>10}{'ms/step':>9}{'tokens/s':>10}",
    ]
    for name, row in report["rows"].items():
        step = 1e3 * row["step"]
        lines.append(f"{name:34}{row['seconds']:9.3f}{row['first']:10.3f}{step:9.2f}{row['tokens_per_second']:10.0f}")
    lines.append(f"{'prompts x group':34}{'ms/step':>9}{'MB/step':>10}{'of copy':>9}{'of probe':>10}")
    for name, row in report["floors"].items():
        of_copy = row["bytes"] / row["step"] / 1e9 / copied
        of_probe = row["operations"] / row["step"] / 1e9 / min(before, after)
        lines.append(f"{name:34}{1e3 * row['step']:9.2f}{row['bytes'] / 1e6:10.1f}{of_copy:9.0%}{of_probe:10.0%}")
    grouped, repeated = (report["memory"][name] / 2**20 for name in ("grouped", "repeated"))
    return "\n".join(
        [*lines, f"memory {grouped:.0f} MiB; {repeated:.0f} with repeated prompts: {grouped / repeated:.2f}"]
    )


if __name__ == "__main__":
    main()
