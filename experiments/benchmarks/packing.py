"""Times DPO over a preference set of long-tailed lengths: packed rows against padded batches, in pairs per second.

    python experiments/benchmarks/packing.py --json packing.json

256 pairs by default: prompts and completions of log-normal lengths (medians 32 and 64, sigma 0.8), a side cut at 512
tokens; a random Llama of 7.1 M parameters in float32, the reference in the step. The candidates, in turns, each one
epoch of updates on batches made ahead, between probes (a 2048-cubed float32 matrix product):
  padded    8 pairs a batch, every row 512 columns
  buckets   8 pairs a batch in the narrowest of `--buckets`, as `data.batches` fills them
  packed    `data.packing`: 4 rows of 1024, both sides of each pair in one row, as many pairs as fit
Pairs in an update differ between them, and so would a learning rate; what is compared is how long an epoch takes. The
fill is tokens over columns that run through the network.

Read on two CPU cores (jax 0.10.2, 2026-11-21, `--pairs 64`, probes 372-437, one of two rounds counts): 5.5 pairs a
second padded to 512, 13.8 in buckets, 12.4 packed; fill 25, 53 and 79 %. So 2.3 x over padded batches, but 0.9 to 1.0 x
of buckets: attention over packed rows of 1024 costs a CPU what the padding did. One compiled shape instead of three.
"""

import jax
import jax.numpy as jnp
import numpy as np
import timing
import turns
import updates
from peers import SHAPE

from alignax import layouts
from alignax.algorithms import preference
from alignax.data import batching, packing
from alignax.data.tokens import TokenPair, TokenRow

TINY = {"vocab": 64, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 24}
TINY_WORK = {"rounds": 1, "least_gflops": 0, "pairs": 6, "cap": 32, "buckets": [16, 32], "batch_size": 2, "rows": 1}


def main(words: list[str] | None = None):
    """Parses the command line, measures, prints and writes."""
    parser = turns.parser(__doc__)
    updates.add_options(parser)
    parser.add_argument("--pairs", type=int, default=256, help="of the set (default: 256)")
    parser.add_argument("--cap", type=int, default=512, help="most tokens of a side (default: 512)")
    parser.add_argument("--buckets", type=int, nargs="+", default=[128, 256, 512], help="default: 128 256 512")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs of a padded batch (default: 8)")
    parser.add_argument("--rows", type=int, default=4, help="packed rows of a batch, each twice the cap (default: 4)")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, in seconds")
    args = parser.parse_args(words)
    args.shape = SHAPE
    if args.tiny:
        vars(args).update(TINY_WORK, shape=TINY)
    report = measure(args)
    turns.publish(report, table(report), args.json)


def measure(args) -> dict:
    """Compiles what each candidate needs and times an epoch of each in turns."""
    data = preferences(args.pairs, args.cap, args.shape["vocab"])
    model = timing.llama(args.shape, max_positions=args.cap, remat=updates.policy(args.remat))
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = sum(pair.chosen.length + pair.rejected.length for pair in data)
    runs, about = {}, {}
    for name, (of_epoch, loss_fn, columns) in candidates(args, model, data).items():
        batches = [jax.tree.map(jnp.asarray, preference.Batch(**batch)) for batch in of_epoch]
        runs[name] = turns.once(epoch(args, loss_fn, params, batches))
        fill = tokens / sum(columns(batch) for batch in batches)
        about[name] = {"fill": fill, "updates": len(batches), "shapes": len({b.tokens.shape for b in batches})}
    rounds = turns.rounds(runs, timing.probe, args)
    return {"pairs": args.pairs, "cap": args.cap, "tokens": tokens, "candidates": about, "rounds": rounds}


def preferences(count: int, cap: int, vocab: int) -> list[TokenPair]:
    """Random pairs, a side of at most `cap` tokens; the medians are 1/16 of it for prompts, 1/8 for completions."""
    rng = np.random.default_rng(0)

    def lengths(median):
        return np.clip(rng.lognormal(np.log(median), 0.8, count), 2, cap).astype(int)

    def side(prompt, completion):
        tokens = np.concatenate([prompt, rng.integers(0, vocab, completion)])[:cap].astype(np.int32)
        return TokenRow(tokens, np.arange(len(tokens)) >= len(prompt))

    sizes = zip(np.minimum(lengths(cap / 16), cap // 2), lengths(cap / 8), lengths(cap / 8), strict=True)
    prompts = ((rng.integers(0, vocab, prompt), chosen, rejected) for prompt, chosen, rejected in sizes)
    return [TokenPair(side(prompt, chosen), side(prompt, rejected)) for prompt, chosen, rejected in prompts]


def candidates(args, model, data: list[TokenPair]) -> dict:
    """For each: the batches of an epoch, the loss function, the columns that a batch runs through the network."""
    width = 2 * args.cap
    members = packing.usual_members(packing.token_counts(data), width=width)
    packed = layouts.packed(model, width=width, members=2 * members)  # a pair is two rows

    def padded(buckets):
        found = batching.batches(data, batching.pairs, batch_size=args.batch_size, buckets=buckets, epochs=1)
        return [batch for batch, _ in found]

    of_rows = packing.packed_batches(
        data, batching.pairs, batch_rows=args.rows, width=width, limit=args.cap, members=members, epochs=1
    )
    plain = updates.dpo(model)
    return {
        "padded": (padded([args.cap]), plain, lambda batch: batch.tokens.size),
        "buckets": (padded(args.buckets), plain, lambda batch: batch.tokens.size),
        "packed": (
            [batch for batch, _ in of_rows],
            layouts.bundled(updates.dpo(packed)),
            lambda batch: len(batch.tokens) * width,
        ),
    }


def epoch(args, loss_fn, params, batches):
    """A function that makes one update on every batch; batches of one shape share a program."""
    frozen, programs = {"reference": params}, {}
    for batch in batches:
        if batch.tokens.shape not in programs:
            programs[batch.tokens.shape] = updates.compiled(
                loss_fn, params, batch, frozen, microbatches=args.microbatches
            )

    def run():
        for batch in batches:
            programs[batch.tokens.shape].step(batch)

    return run


def table(report: dict) -> str:
    """One line for each candidate."""
    rounds = report["rounds"]
    lines = [
        f"{report['pairs']} pairs, {report['tokens']} tokens, sides of at most {report['cap']}; {turns.tally(rounds)}",
        f"{'':10}{'pairs/s':>9}{'of padded':>11}{'fill':>7}{'updates':>9}{'shapes':>8}",
    ]
    ratios = turns.ratios(rounds, "padded")
    for name, seconds in turns.medians(rounds).items():
        about = report["candidates"][name]
        lines.append(
            f"{name:10}{report['pairs'] / seconds:9.1f}{1 / ratios[name]:9.2f} x{about['fill']:7.0%}"
            f"{about['updates']:9}{about['shapes']:8}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
