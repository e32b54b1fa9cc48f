"""Times updates whose prompts run through the network once, against the same rows with their prompts repeated.

    python experiments/benchmarks/shared_prompts.py --json shared.json

GRPO of 4 prompts x 8 completions (512+64, 512+128, 64+128 tokens) and DPO of 8 pairs (64+192), the reference in the
step, by a random Llama of 7.1 M parameters in float32: `layouts.shared_prompt` against rows as they are, in turns,
between probes (a 2048-cubed float32 matrix product), with the temporaries of each program by XLA's own analysis.

What decides is how many times fewer tokens there are; attention to a prompt in one piece and to a completion in
another costs a merge. Where prompts are short, repeating them may be as good.

Read on two CPU cores (jax 0.10.2, 2026-11-21, probes 354-432): 512+64 3.0 s and 0.84 s (3.6 x; 4.5 x fewer tokens),
512+128 2.7 x; 64+128 1.2 x; pairs of 64+192 1.04 to 1.1 x.
"""

import jax
import jax.numpy as jnp
import timing
import turns
import updates
from peers import SHAPE

from alignax import layouts

GROUPS = {"512+64": (512, 64), "512+128": (512, 128), "64+128": (64, 128)}
PAIRS = {"64+192": (64, 192)}
TINY = {"vocab": 64, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 24}
TINY_WORK = {"rounds": 1, "least_gflops": 0, "works": ["64+192"], "prompts": 1, "shorter": 16}


def main(words: list[str] | None = None):
    """Parses the command line, measures, prints and writes."""
    parser = turns.parser(__doc__)
    updates.add_options(parser)
    parser.add_argument(
        "--works", nargs="+", choices=[*GROUPS, *PAIRS], default=[*GROUPS, *PAIRS], help="which lengths"
    )
    parser.add_argument("--prompts", type=int, default=4, help="prompts of 8 completions, or twice as many pairs")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, in seconds")
    args = parser.parse_args(words)
    args.shape, args.shorter = SHAPE, 1
    if args.tiny:
        vars(args).update(TINY_WORK, shape=TINY)
    report = {name: measure(args, name) for name in args.works}
    turns.publish(report, table(report), args.json)


def measure(args, work: str) -> dict:
    """One work: both programs in turns."""
    prompt, completion = (n // args.shorter for n in (GROUPS | PAIRS)[work])
    model = timing.llama(args.shape, max_positions=prompt + completion, remat=updates.policy(args.remat))
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = {"reference": jax.tree.map(jnp.copy, params)}
    members = 2 if work in PAIRS else 8
    runs, memory, losses = {}, {}, {}
    for name, shared in (("rows", 0), ("shared", prompt)):
        if work in PAIRS:
            batch = updates.pairs(args.shape["vocab"], 2 * args.prompts, prompt, completion)
            loss_fn = updates.dpo(model, shared=shared)
        else:
            batch = updates.groups(args.shape["vocab"], args.prompts, members, prompt, completion)
            loss_fn = updates.group_policy(model, shared=shared, group=members)
        update = updates.compiled(loss_fn, params, batch, frozen, microbatches=args.microbatches)
        memory[name], losses[name] = update.temporary_bytes, float(update.step()["grad_norm"])
        runs[name] = turns.once(update.step)
    return {
        "members": members,
        "fewer_tokens": layouts.shared_prompt_gain(prompt, completion, members),
        "grad_norm": losses,
        "temporary_bytes": memory,
        "rounds": turns.rounds(runs, timing.probe, args),
    }


def table(report: dict) -> str:
    """One line for each work."""
    heads = "".join(f"{name:>{width}}" for name, width in (("rows, MiB", 11), ("shared, MiB", 13)))
    lines = [f"{'':16}{'tokens':>14}{'rows, s':>10}{'shared, s':>11}{'faster':>9}{heads}  rounds"]
    for name, row in report.items():
        seconds, memory = turns.medians(row["rounds"]), row["temporary_bytes"]
        faster = turns.ratios(row["rounds"], "shared")["rows"]
        lines.append(
            f"{name + ' x ' + str(row['members']):16}{row['fewer_tokens']:8.2f} fewer"
            f"{seconds['rows']:10.3f}{seconds['shared']:11.3f}{faster:7.2f} x"
            f"{memory['rows'] / 2**20:11.1f}{memory['shared'] / 2**20:13.1f}  {turns.tally(row['rounds'])}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
