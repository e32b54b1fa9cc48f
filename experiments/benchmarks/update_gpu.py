"""Model FLOPs utilisation of updates on one GPU: random Llamas of 1 B and 3 B parameters, bfloat16, 2,048 tokens.

    python experiments/benchmarks/update_gpu.py --peer --json update_gpu.json
    python experiments/benchmarks/update_gpu.py --lower --attention triton

For each model and work: seconds of an update, tokens per second, model operations over the rate of a measured
8192-cubed bfloat16 matrix product, and peak memory. `sft` trains on every token of its rows, `dpo` on pairs of
1024+1024 tokens, `grpo` on groups of 8 completions with prompts of 1024, in rows of 2,048; the reference is computed in
the step. Operations are 2 x parameters used x tokens x (3 for the policy, + 1 for a reference), the head's for the
tokens scored alone; what attention adds (half of all pairs of tokens) is in the second figure.

Each reading is a process of its own, so that its peak is its own. `--peer` times the same work in transformers and
torch (`torch_peer.py`: sdpa attention, gradient checkpointing as TRL sets it by default). `--layout shared` runs a
prompt once; then tokens are fewer, and the operations counted are those that are left. `--param-dtype float32` holds
masters, moments and gradients in float32. `--lower` lowers the programs for CUDA from shapes alone, on any machine
(attention is chosen for what is there: name one; cuDNN wants to be there).
`--tiny` runs all of it on a CPU, and its numbers mean nothing.

The peer needs torch and transformers; nothing here does. On a GPU this has not run yet: none was at hand.
"""

import argparse
import datetime
import functools
import json
import os
import pathlib
import re
import sys

import turns

LLAMAS = {
    "1b": {"vocab": 128_256, "width": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "head_dim": 64, "mlp": 8192},
    "3b": {"vocab": 128_256, "width": 3072, "layers": 28, "heads": 24, "kv_heads": 8, "head_dim": 128, "mlp": 8192},
    "tiny": {"vocab": 256, "width": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 64},
}
WORKS = {"sft": 3, "dpo": 4, "grpo": 4}  # passes
ATTENTION = ("auto", "plain", "tiles", "cudnn", "triton")  # functions of models.flash
TINY = {"models": ["tiny"], "length": 16, "rows": 2, "group": 2, "repeats": 1, "matmul": 64}


def main(words: list[str] | None = None):
    """Parses the command line; measures in processes, or is one of them, or lowers."""
    args = parse(words)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when JAX takes the GPU, which comes later
    if args.worker:
        print(json.dumps(WORKERS[args.worker](args)))
    elif args.lower:
        for model, work in ((model, work) for model in args.models for work in args.works):
            print(f"{model} {work}: {lowered(args, model, work)}")
    else:
        report = measure(args)
        turns.publish(report, table(report), args.json)


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line; with --tiny the small work stands in place of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=LLAMAS, default=["1b", "3b"], help="default: 1b 3b")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS], help="default: all")
    for name, default, text in (
        ("length", 2048, "tokens of a row; half of them are the prompt of dpo and grpo"),
        ("rows", 32, "rows of a batch: 32 texts, 16 pairs or 4 groups of 8"),
        ("group", 8, "completions of a prompt"),
        ("microbatches", 4, "parts of a batch, and of the peer's"),
        ("repeats", 5, "timed updates; the median counts"),
        ("matmul", 8192, "size of the matrix product that the operations are held against"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--param-dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.add_argument("--remat", default="dots", help="what the forward pass keeps, see updates.py (default: dots)")
    parser.add_argument("--layout", choices=["rows", "shared"], default="rows", help="of prompts (default: rows)")
    parser.add_argument("--attention", choices=ATTENTION, default="auto", help="of whole rows (default: auto)")
    parser.add_argument("--peer", action="store_true", help="time transformers and torch too")
    parser.add_argument("--peer-python", default=sys.executable, help="its interpreter (default: this one)")
    parser.add_argument("--lower", action="store_true", help="only lower the programs for CUDA")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, on a CPU, in seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write the readings here as well")
    parser.add_argument("--worker", choices=WORKERS, help="be one of the processes")
    args = parser.parse_args(words)
    if args.tiny:
        vars(args).update(TINY | {"microbatches": 1})
    if args.rows % (args.microbatches * 2) or args.rows % (args.microbatches * args.group):
        parser.error(f"--rows {args.rows} hold no whole pairs and groups in each of {args.microbatches} micro-batches")
    return args


def measure(args: argparse.Namespace) -> dict:
    """Every model and work, ours and the peer's, one process each; the others count where one fails."""
    report = {"date": datetime.date.today().isoformat(), "about": run(args, "about", []), "rows": []}
    report["arguments"] = {name: value for name, value in vars(args).items() if name != "json"}
    for model, work in ((model, work) for model in args.models for work in args.works):
        row = {"model": model, "work": work, "operations": operations(args, model, work)}
        row["ours"] = run(args, "ours", ["--models", model, "--works", work])
        if args.peer:
            row["peer"] = run(args, "peer", ["--models", model, "--works", work])
        report["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return report


def run(args: argparse.Namespace, worker: str, more: list[str]) -> dict:
    """What a process found, or why it found nothing."""
    told = (
        "length",
        "rows",
        "group",
        "microbatches",
        "repeats",
        "matmul",
        "param_dtype",
        "remat",
        "layout",
        "attention",
    )
    options = [word for name in told for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    python = args.peer_python if worker == "peer" else sys.executable
    try:
        return turns.process(python, __file__, worker, [*options, *["--tiny"] * args.tiny, *more])
    except RuntimeError as error:  # out of memory, say
        return {"failed": str(error)[-500:]}


def about(args: argparse.Namespace) -> dict:
    """The device and its rate."""
    import jax
    import timing

    rate = timing.probe(args.matmul, "bfloat16")
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "gflops": rate}


def operations(args: argparse.Namespace, model: str, work: str) -> dict[str, int]:
    """Of one update, without attention and of attention, and the tokens that run through the network."""
    from updates import operations

    shape, prompt = LLAMAS[model], 0 if work == "sft" else args.length // 2
    scored = args.rows * (args.length - prompt)
    members = {"sft": 1, "dpo": 2, "grpo": args.group}[work] if args.layout == "shared" else 1
    fed = scored + args.rows // members * prompt
    # a completion's tokens see the prompt and half of the completion, a prompt's half of it; 4 for two products
    seen = scored * (prompt + (args.length - prompt) / 2) + args.rows // members * prompt * prompt / 2
    attention = 4 * WORKS[work] * shape["layers"] * shape["heads"] * shape["head_dim"] * seen
    return {"without": operations(shape, fed, scored, WORKS[work]), "attention": int(attention), "fed": fed}


def problem(args: argparse.Namespace, name: str, work: str):
    """The model, its loss function, and a function that makes the batch."""
    import timing
    import updates

    from alignax.algorithms import sft
    from alignax.models import flash

    shape, prompt = LLAMAS[name], args.length // 2
    options = {"param_dtype": args.param_dtype, "remat": updates.policy(args.remat), "rope_theta": 500_000.0}
    options["attention"] = None if args.attention == "auto" else getattr(flash, args.attention)()
    model = timing.llama(shape, max_positions=args.length, dtype="bfloat16", tie_embeddings=True, **options)
    vocab, sizes = shape["vocab"], (prompt, args.length - prompt)
    shared = prompt if args.layout == "shared" else 0
    if work == "sft":
        return model, sft.make_loss(model), functools.partial(updates.texts, vocab, args.rows, args.length)
    if work == "dpo":
        loss_fn = updates.dpo(model, shared=shared)
        return model, loss_fn, functools.partial(updates.pairs, vocab, args.rows // 2, *sizes)
    loss_fn = updates.group_policy(model, shared=shared, group=args.group)
    return model, loss_fn, functools.partial(updates.groups, vocab, args.rows // args.group, args.group, *sizes)


def ours(args: argparse.Namespace) -> dict:
    """One update, compiled and timed."""
    import jax
    import timing
    import updates

    model, loss_fn, make = problem(args, args.models[0], args.works[0])
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = None if args.works[0] == "sft" else {"reference": params}
    update = updates.compiled(loss_fn, params, make(), frozen, microbatches=args.microbatches)
    if frozen is None:
        del params
    update.step()
    seconds = timing.median_seconds(update.step, args.repeats)
    stats = jax.devices()[0].memory_stats() or {}
    found = {"seconds": seconds, "compile_seconds": update.compile_seconds, "temporary_bytes": update.temporary_bytes}
    return found | {"peak_bytes": stats.get("peak_bytes_in_use", 0)}


def peer(args: argparse.Namespace) -> dict:
    """The same work by torch."""
    import torch_peer

    names = ("length", "rows", "group", "microbatches", "repeats", "param_dtype")
    return torch_peer.update(LLAMAS[args.models[0]], args.works[0], **{name: getattr(args, name) for name in names})


WORKERS = {"about": about, "ours": ours, "peer": peer}


def lowered(args: argparse.Namespace, name: str, work: str) -> str:
    """How large the program for CUDA is; nothing of its size is allocated."""
    import jax
    import optax

    from alignax import train

    model, loss_fn, make = problem(args, name, work)
    optimizer = optax.adamw(1e-6)
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(lambda params: train.TrainState.create(params, optimizer), params)
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=args.microbatches), donate_argnums=0)
    frozen = None if work == "sft" else {"reference": params}
    found = update.trace(state, jax.eval_shape(make), frozen).lower(lowering_platforms=("cuda",))
    text = found.as_text()
    kernels = sorted(set(re.findall(r"custom_call @([\w$.]+)", text)))
    return f"{len(text.splitlines())} lines of StableHLO for CUDA, kernels {kernels}"


def table(report: dict) -> str:
    """The report for the eye."""
    args, about = report["arguments"], report["about"]
    if "failed" in about:
        return f"no device: {about['failed']}"
    lines = [
        f"{about['device']}, jax {about['jax']}, {report['date']}; {args['rows']} rows of {args['length']}, "
        f"{args['microbatches']} micro-batches, parameters in {args['param_dtype']}, remat {args['remat']}, "
        f"{args['layout']}; a {args['matmul']}-cubed bfloat16 product runs at {about['gflops'] / 1e3:.1f} TFLOP/s",
        f"{'':14}{'seconds':>9}{'tokens/s':>10}{'TFLOP':>9}{'of matmul':>11}{'with attention':>16}{'peak GB':>9}",
    ]
    for row in report["rows"]:
        for who in ("ours", "peer"):
            if who in row:
                lines.append(f"{row['model']:5}{row['work']:5}{who:4}" + _line(row[who], row["operations"], about))
    return "\n".join(lines)


def _line(found: dict, operations: dict, about: dict) -> str:
    if "failed" in found:
        return "  failed: " + found["failed"].strip().splitlines()[-1][:90]
    seconds, rate = found["seconds"], 1e9 * about["gflops"] * found["seconds"]
    without, attention = operations["without"], operations["attention"]
    return (
        f"{seconds:9.4f}{operations['fed'] / seconds:10.0f}{without / 1e12:9.2f}{without / rate:11.1%}"
        f"{(without + attention) / rate:16.1%}{found['peak_bytes'] / 1e9:9.2f}"
    )


if __name__ == "__main__":
    main()
