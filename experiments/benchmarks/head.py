"""Times the head: log-probabilities of 4,096 tokens over a vocabulary of 128,000, with their gradients, in three forms.

    python experiments/benchmarks/head.py --json head.json

One value_and_grad of the mean log-probability, with respect to states of width 256 and the head: `logprobs.score`
(here with a body that is nothing but the states), `jax.nn.log_softmax` over materialised logits, and the leaner gather
minus logsumexp. In turns, between probes (a 2048-cubed float32 matrix product). Memory is XLA's own analysis of the
temporaries of each program.

Read on two CPU cores (jax 0.10.2, 2026-11-21, probes 233-418): 5.1 s and 250 MiB; log_softmax 10.9-12.8 s and 7998 MiB;
gather minus logsumexp 4.7-5.0 s and 3998 MiB. So 3 % of the memory in half of the time, and 1.04 x that of the leaner
form, though logits are made twice: fresh pages cost what the product costs.
"""

import functools

import jax
import jax.numpy as jnp
import timing
import turns

from alignax import logprobs
from alignax.types import Hidden

TINY = {"vocab": 500, "tokens": 64, "width": 16, "rounds": 1, "least_gflops": 0}
SHAPE = {"layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "mlp": 1}  # of a body that is never run


def main(words: list[str] | None = None):
    """Parses the command line, measures, prints and writes."""
    parser = turns.parser(__doc__)
    parser.add_argument("--vocab", type=int, default=128_000, help="vocabulary (default: 128000)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens, in rows of a quarter (default: 4096)")
    parser.add_argument("--width", type=int, default=256, help="of the states (default: 256)")
    parser.add_argument("--tiny", action="store_true", help="prove that it runs, in seconds")
    args = parser.parse_args(words)
    if args.tiny:
        vars(args).update(TINY)
    report = measure(args)
    turns.publish(report, table(report), args.json)


def measure(args) -> dict:
    """Compiles the three forms and times them in turns."""
    model = timing.llama(SHAPE | {"vocab": args.vocab, "width": args.width}, max_positions=args.tokens)
    keys = jax.random.split(jax.random.key(0), 3)
    states = jax.random.normal(keys[0], (4, args.tokens // 4, args.width))
    tokens = jax.random.randint(keys[1], states.shape[:2], 0, args.vocab)
    params = {"states": states, "head": {"kernel": 0.02 * jax.random.normal(keys[2], (args.width, args.vocab))}}
    runs, memory, values = {}, {}, {}
    for name, form in FORMS.items():
        program = jax.jit(jax.value_and_grad(functools.partial(form, model))).lower(params, tokens).compile()
        memory[name] = program.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
        values[name] = float(program(params, tokens)[0])
        runs[name] = turns.once(lambda program=program: jax.block_until_ready(program(params, tokens)))
    rounds = turns.rounds(runs, timing.probe, args)
    told = {"vocab": args.vocab, "tokens": args.tokens, "width": args.width}
    return {**told, "rounds": rounds, "temporary_bytes": memory, "values": values}


def scored(model, params, tokens):
    """`logprobs.score`, the states in place of a body."""
    given = model._replace(hidden=lambda params, *_, **__: Hidden(params["states"], None, {}))
    return _mean(logprobs.score(given, params, tokens, jnp.ones_like(tokens)).logp[:, 1:])


def log_softmax(model, params, tokens):
    """jax.nn.log_softmax of logits that are all there at once."""
    every = jax.nn.log_softmax(model.logits(params, params["states"]))
    return _mean(jnp.take_along_axis(every[:, :-1], tokens[:, 1:, None], axis=2)[..., 0])


def gathered(model, params, tokens):
    """The same as logit minus logsumexp."""
    logits = model.logits(params, params["states"])[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]
    return _mean(chosen - jax.nn.logsumexp(logits, axis=2))


def _mean(logp):
    return jnp.mean(logp)


FORMS = {"score": scored, "log_softmax": log_softmax, "gather - logsumexp": gathered}


def table(report: dict) -> str:
    """The three forms, and what `score` takes of the others' time and memory."""
    rounds, memory = report["rounds"], report["temporary_bytes"]
    lines = [
        f"{report['tokens']} tokens, vocabulary {report['vocab']}, width {report['width']}; {turns.tally(rounds)}",
        f"{'':20}{'seconds':>9}{'MiB':>9}{'score: time':>13}{'memory':>8}{'mean logp':>12}",
    ]
    for name, median in turns.medians(rounds).items():
        times, share = 1 / turns.ratios(rounds, "score")[name], memory["score"] / memory[name]
        line = f"{name:20}{median:9.3f}{memory[name] / 2**20:9.1f}{times:11.2f} x{share:8.1%}"
        lines.append(f"{line}{report['values'][name]:12.6f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
