"""Times the compilation of a GRPO update (value, gradient, AdamW) of a model of 2 layers and of one of 32.

    python experiments/benchmarks/compile_time.py --json compile_time.json

Layers are stacked and scanned over, so that depth should cost next to nothing. Widths are tiny: how long XLA takes
depends on the operations it sees, not on their sizes. In turns, between probes (a 2048-cubed float32 matrix product),
each from an empty cache: tracing, lowering and compiling in one. Functions that JAX itself wrote once in a process
(random numbers, say) are traced by a first compilation that is not counted.

Read on two CPU cores (jax 0.10.2, 2026-11-21): 3.45 s and 3.53 s, a ratio of 1.00 in its rounds.
"""

import jax
import jax.numpy as jnp
import timing
import turns
import updates

TINY = {"vocab": 64, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 24}


def main(words: list[str] | None = None):
    """Parses the command line, measures, prints and writes."""
    parser = turns.parser(__doc__)
    updates.add_options(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 32], help="of the models (default: 2 32)")
    parser.add_argument("--layout", choices=["rows", "shared"], default="rows", help="of the update (default: rows)")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, in seconds")
    args = parser.parse_args(words)
    if args.tiny:
        vars(args).update(rounds=1, least_gflops=0)
    jax.config.update("jax_enable_compilation_cache", False)
    report = {"layers": args.layers, "rounds": turns.rounds(runs(args), timing.probe, args)}
    turns.publish(report, table(report), args.json)


def runs(args) -> dict:
    """A run for each depth: it compiles, and says how long that took."""
    batch = updates.groups(TINY["vocab"], 2, 4, 16, 16)

    def compiling(layers):
        model = timing.llama(TINY | {"layers": layers}, max_positions=32, remat=updates.policy(args.remat))
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(model.init, jax.random.key(0)))
        shared = 16 if args.layout == "shared" else 0
        loss_fn = updates.group_policy(model, shared=shared, group=4)
        jax.clear_caches()
        frozen = {"reference": params}
        return updates.compiled(loss_fn, params, batch, frozen, microbatches=args.microbatches).compile_seconds

    if not args.tiny:
        compiling(args.layers[0])
    return {str(layers): lambda layers=layers: compiling(layers) for layers in args.layers}


def table(report: dict) -> str:
    """The seconds of each depth and their ratio to the first."""
    rounds = report["rounds"]
    ratios = turns.ratios(rounds, str(report["layers"][0]))
    lines = [f"compilation of a GRPO update; {turns.tally(rounds)}"]
    lines += [f"{name:>4} layers{x:8.2f} s{ratios[name]:7.2f} x" for name, x in turns.medians(rounds).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
