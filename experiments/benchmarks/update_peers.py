"""Times updates beside the libraries one would otherwise use: the same work, one process each, in turns.

    python experiments/benchmarks/update_peers.py dpo --trl PYTHON --tunix PYTHON --json dpo.json
    python experiments/benchmarks/update_peers.py grpo --trl PYTHON --tunix PYTHON --prompt-length 512

PYTHON is the interpreter of an environment that has the library (`pip install torch trl`; `pip install google-tunix`,
Python 3.12); one that is not given is left out. A random Llama of 7.1 M parameters, float32, AdamW.

`dpo`: an update on 8 pairs of 64+192 tokens, the reference computed in the step; a second line of ours reads the
reference's log-probabilities from the batch, as after `data`'s cache. `grpo`: a whole step, 4 prompts x 8 samples of
128 tokens, a reward in Python (the share of odd ids), one update with the reference in it, beta 0.04. Libraries with a
trainer are timed between its steps, its own data loading in it, as ours is with what the step needs.

Rounds and probes are those of `peers.py`. The last line holds model operations, 2 x parameters used x tokens x (3 for
the policy + 1 for the reference), attention apart, over the probe: the layers for tokens that run through them (a
shared prompt once), the head for the completions' tokens alone, which are those scored, and for what was sampled.

What our rows do is a choice: `--remat`, `--microbatches` and `--layout`. See `shared_prompts.py` for when a prompt that
runs once pays. Smaller parts leave the machine's caches less, and fresh pages cost time: temporaries of an update are
taken anew from the system every time.

Read on two cores of an AMD EPYC (jax 0.10.2, torch 2.13, TRL 1.16, Tunix 0.1.7, 2026-11-21; four rounds each, two with
512 tokens; each had a probe below 400, 335 to 447, so that none counts by the strict rule): DPO 0.60-0.65 s, with the
reference cached 0.48-0.52, TRL 3.6-4.1 x, Tunix 2.0-2.1 x. GRPO 1.15-1.33 s, TRL 3.6-4.2 x (median 4.05), Tunix
3.1-3.4 x; with prompts of 512 tokens 1.8-2.0 s, TRL 9.1-9.2 x. What was learned, of 0.92 s at first: products over
two token axes were transposed by XLA before the kernel's gradient (0.10 s in the layers, 0.07 in the head; flattened
now); quarters of the queries spare 3/8 of attention (0.06); masked-in tokens alone meet the head (0.05); four
micro-batches spare page faults (0.05); a pair's prompt once (0.04-0.08).
"""

import json
import sys

import turns
from peers import SHAPE, probe

PAIRS, PROMPTS, GROUP, WARM = 8, 4, 8, 2
COMPLETION = {"dpo": 192, "grpo": 128}


def main():
    """Parses the command line; measures in turns, or is one of the processes."""
    parser = turns.parser(__doc__)
    parser.add_argument("work", choices=COMPLETION, help="what to time")
    turns.add_processes(parser, WORKERS, trl="torch and trl", tunix="google-tunix")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of each prompt (default: 64)")
    parser.add_argument("--layout", choices=["rows", "shared"], default="shared", help="of ours (default: shared)")
    parser.add_argument("--remat", default="dots", help="of ours, a name in updates.py (default: dots)")
    parser.add_argument("--microbatches", type=int, default=4, help="of ours (default: 4)")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(probe() if args.worker == "probe" else WORKERS[args.worker](args)))
        return
    report = measure(args)
    turns.publish(report, table(report), args.json)


def measure(args) -> dict:
    """All rounds: every library once in each, between probes."""
    pythons = {"alignax": sys.executable, "cached": sys.executable, "trl": args.trl, "tunix": args.tunix}
    if args.work == "grpo":
        del pythons["cached"]
    told = {name: getattr(args, name) for name in ("prompt_length", "repeats", "layout", "remat", "microbatches")}
    options = [word for name, value in told.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    runs = turns.processes(__file__, pythons, [args.work, *options])
    rounds = turns.rounds(runs, lambda: turns.process(sys.executable, __file__, "probe", [args.work]), args)
    return {"work": args.work, **told, "operations": operations(args), "rounds": rounds}


def operations(args) -> dict[str, int]:
    """Model operations of one step of ours; see `updates.operations`."""
    from updates import operations

    rows = 2 * PAIRS if args.work == "dpo" else PROMPTS * GROUP
    prompts = rows if args.layout == "rows" else {"dpo": PAIRS, "grpo": PROMPTS}[args.work]
    scored = rows * COMPLETION[args.work]
    fed = prompts * args.prompt_length + scored
    if args.work == "dpo":
        return {"alignax": operations(SHAPE, fed, scored, 4), "cached": operations(SHAPE, fed, scored, 3)}
    sampled = operations(SHAPE, PROMPTS * args.prompt_length + scored, scored, 1)
    return {"alignax": sampled + operations(SHAPE, fed, scored, 4)}


def alignax_dpo(args, cached: bool = False) -> list[float]:
    """One compiled program; `cached`: the batch brings the reference's log-probabilities."""
    import jax
    import jax.numpy as jnp
    import updates

    model, params = _ours(args)
    batch = updates.pairs(SHAPE["vocab"], PAIRS, args.prompt_length, COMPLETION["dpo"])
    if cached:
        batch = batch._replace(ref_logp=jnp.zeros(batch.tokens.shape))
    loss_fn = updates.dpo(model, shared=_shared(args))
    frozen = None if cached else {"reference": jax.tree.map(jnp.copy, params)}
    update = updates.compiled(loss_fn, params, batch, frozen, microbatches=args.microbatches)
    return turns.seconds(update.step, WARM + args.repeats)[WARM:]


def alignax_grpo(args) -> list[float]:
    """Two programs: samples with their advantages' rewards on the host, then the update."""
    import functools

    import jax
    import numpy as np
    import updates

    from alignax.advantages import group_relative
    from alignax.algorithms import grpo
    from alignax.sampling import generate

    (model, params), new = _ours(args), COMPLETION["grpo"]
    prompts = jax.random.randint(jax.random.key(3), (PROMPTS, args.prompt_length), 0, SHAPE["vocab"])
    lengths = np.full(PROMPTS, args.prompt_length)
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=new, group=GROUP))
    relative = jax.jit(group_relative)

    def rollout(params, number):
        samples = sample(params, prompts, lengths, jax.random.fold_in(jax.random.key(4), number), temperature=1.0)
        tokens, segments, mask = (
            x.reshape(PROMPTS, GROUP, -1) for x in (samples.tokens, samples.segments, samples.mask)
        )
        rewards = [odd(row) for row in np.asarray(samples.tokens)[:, -new:].tolist()]
        return grpo.Batch(tokens, segments, mask, relative(np.array(rewards, np.float32).reshape(PROMPTS, GROUP)))

    loss_fn = updates.group_policy(model, shared=_shared(args), group=GROUP)
    frozen = {"reference": params}
    update = updates.compiled(loss_fn, params, rollout(params, 0), frozen, microbatches=args.microbatches)
    numbers = iter(range(1, WARM + args.repeats + 1))
    return turns.seconds(lambda: update.step(rollout(update.params(), next(numbers))), WARM + args.repeats)[WARM:]


def _ours(args):
    import jax
    import timing
    import updates

    length = args.prompt_length + COMPLETION[args.work]
    model = timing.llama(SHAPE, max_positions=length, remat=updates.policy(args.remat))
    return model, jax.jit(model.init)(jax.random.key(0))


def _shared(args) -> int:
    return args.prompt_length if args.layout == "shared" else 0


def odd(tokens: list[int]) -> float:
    """The reward of all libraries: the share of odd ids."""
    return sum(token % 2 for token in tokens) / max(len(tokens), 1)


def trl_steps(args) -> list[float]:
    """Its trainer, see trl_peer.py."""
    import trl_peer

    return _trainer(args, trl_peer)


def tunix_steps(args) -> list[float]:
    """Its trainer, see tunix_peer.py."""
    import tunix_peer

    return _trainer(args, tunix_peer)


def _trainer(args, peer) -> list[float]:
    # one step more than there are differences between steps
    sizes = {"prompt": args.prompt_length, "completion": COMPLETION[args.work], "steps": WARM + args.repeats + 1}
    if args.work == "dpo":
        stamps = peer.dpo(SHAPE, pairs=PAIRS, **sizes)
    else:
        stamps = peer.grpo(SHAPE, prompts=PROMPTS, group=GROUP, reward=odd, **sizes)
    return turns.between(stamps, WARM)


WORKERS = {
    "alignax": lambda args: {"dpo": alignax_dpo, "grpo": alignax_grpo}[args.work](args),
    "cached": lambda args: alignax_dpo(args, cached=True),
    "trl": trl_steps,
    "tunix": tunix_steps,
}


def table(report: dict) -> str:
    """The medians of the rounds that count, their ratios to alignax, and the operations over the probe."""
    rounds, work = report["rounds"], report["work"]
    size = {"dpo": f"{PAIRS} pairs", "grpo": f"{PROMPTS} prompts x {GROUP} samples"}[work]
    ours = f"ours: {report['layout']}, remat {report['remat']}, {report['microbatches']} micro-batches"
    lines = [
        f"{work}, {size} of {report['prompt_length']}+{COMPLETION[work]} tokens; {turns.tally(rounds)}; {ours}",
        f"{'':10}{'seconds':>9}{'x alignax':>11}{'GFLOP':>9}{'of probe':>10}",
    ]
    ratios = turns.ratios(rounds, "alignax")
    for name, median in turns.medians(rounds).items():
        line = f"{name:10}{median:9.3f}{ratios[name]:11.2f}"
        if name in report["operations"]:
            count = report["operations"][name] / 1e9
            line += f"{count:9.1f}{count / median / turns.peak(rounds):10.0%}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
