"""Times the ways in which whole rows attend, on the device at hand: value and gradient of one layer's attention.

    python experiments/benchmarks/attention.py --lengths 256 1024 4096 --json attention.json

Prints what `alignax.models.flash.choose` picks for each length, and for every way that runs there the median time and
XLA's temporary memory. Rows are packed, two segments each; their number falls as they grow longer, so that all lengths
have as many tokens. `--tiny` runs all of it on a CPU in seconds, and its numbers mean nothing.

On a GPU or a TPU this has not run yet.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import timing

from alignax.models import attention, flash, segment_positions, segment_visibility
from alignax.models.config import LayerKind, TransformerConfig
from alignax.models.rows import Rows
from alignax.models.segments import within_window

WAYS = {
    "plain": flash.plain(),
    "tiles": flash.tiles(),
    "splash": flash.splash(),
    "Triton": flash.triton(),
    "cuDNN": flash.cudnn(),  # one segment per row: less work than the others have
}
ON = {"cpu": ("plain", "tiles"), "tpu": ("plain", "tiles", "splash")}


def main():
    """Parses the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="tokens of a row")
    parser.add_argument("--tokens", type=int, default=8192, help="of all rows (default: 8192)")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 64], help="H, KV, hd (default: 32 8 64)")
    parser.add_argument("--window", type=int, help="a sliding window (default: none)")
    parser.add_argument("--dtype", help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs; the median counts (default: 5)")
    parser.add_argument("--json", type=pathlib.Path, help="write the numbers here as well")
    parser.add_argument("--tiny", action="store_true", help="little of everything")
    args = parser.parse_args()
    if args.tiny:
        args.lengths, args.tokens, args.heads, args.repeats = [64, 1024], 1024, [4, 2, 16], 1
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    report = [measure(args, length) for length in args.lengths]
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def measure(args: argparse.Namespace, length: int) -> dict:
    """All ways for rows of one length, printed as they come."""
    rows, (heads, kv_heads, width) = max(1, args.tokens // length), args.heads
    choice = flash.choose(config(args), length=length, rows=rows)
    print(f"{rows} x {length} tokens, probe {timing.probe():.0f} GFLOP/s; {choice}")
    found = {"device": jax.devices()[0].device_kind, "length": length, "rows": rows, "choice": str(choice), "ways": {}}
    for name in ON.get(jax.default_backend(), ("plain", "tiles", "Triton", "cuDNN")):
        try:
            seconds, temporary = timed(args, WAYS[name], (rows, length, heads, kv_heads, width))
        except Exception as error:  # a kernel that the device, the dtype or the window does not suit, or memory
            found["ways"][name] = {"error": f"{type(error).__name__}: {error}"[:200]}
        else:
            found["ways"][name] = {"milliseconds": 1e3 * seconds, "temporary_megabytes": temporary / 1e6}
        print(f"  {name:8}{found['ways'][name]}", flush=True)
    return found


def config(args: argparse.Namespace) -> TransformerConfig:
    """As much of a decoder as `choose` looks at."""
    heads, kv_heads, width = args.heads
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": width, "num_layers": 1, "dtype": args.dtype}
    kinds = (LayerKind(window=args.window),)
    return TransformerConfig(vocab_size=8, hidden_size=8, intermediate_size=8, pattern=kinds, **shape)


def timed(args: argparse.Namespace, choice: flash.Choice, shape: tuple[int, ...]) -> tuple[float, int]:
    """Seconds of value and gradient, and bytes of temporary memory."""
    rows, length, heads, kv_heads, width = shape
    keys = jax.random.split(jax.random.key(0), 3)
    counts = (heads, kv_heads, kv_heads)
    arrays = [jax.random.normal(key, (rows, length, n, width), args.dtype) for key, n in zip(keys, counts)]
    segments = jnp.broadcast_to(1 + (jnp.arange(length) >= length // 3), (rows, length))

    def value(queries, keys, values, segments):
        cache = attention.as_cache(keys, values)
        if choice.attend is None:
            positions = segment_positions(segments)
            visible = within_window(segment_visibility(segments), positions, positions, args.window)
            mixed = attention.attend(queries, cache, visible)
        else:
            mixed = Rows(choice.attend, (args.window,), segments).attend(queries, cache)
        return jnp.sum(jnp.sin(mixed.astype(jnp.float32)))

    compiled = jax.jit(jax.value_and_grad(value, (0, 1, 2))).lower(*arrays, segments).compile()

    def run():
        jax.block_until_ready(compiled(*arrays, segments))

    run()
    return timing.median_seconds(run, args.repeats), _temporary(compiled)


def _temporary(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


if __name__ == "__main__":
    main()
