"""Times rollouts beside the libraries one would otherwise use: the same work, one process each, in turns.

    python experiments/benchmarks/peers.py --transformers PYTHON --tunix PYTHON --prompt-length 64 --json rollouts.json

PYTHON is the interpreter of an environment that has the library (`pip install torch transformers`; `pip install
google-tunix`, Python 3.12); one that is not given is left out. The work: 4 prompts x 8 completions of 128 tokens by a
random Llama of 7.1 M parameters, float32, temperature 1, no EOS. Each process warms up once, then times a few runs;
before and after it another process times a 2048-cubed float32 matrix product. A round counts when its probes agree to
10 % and reach --least-gflops: machines that are shared change speed under one's feet.

Read on two cores of an AMD EPYC (jax 0.10.2, torch 2.13, transformers 5.23, Tunix 0.1.7, 2026-11-21): see the README's
numbers. What was learned: a prompt that is prefilled and read once for its group costs 3.5 ms a step at 512 tokens
where the repeated one costs 5.5; the layers' parameters, sliced from their stack inside the loop, were copied for every
token; one pass for the maximum and one for the sum are all that a draw needs when nothing is filtered.
"""

import json
import sys

import turns

SHAPE = {"vocab": 8192, "width": 256, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 64, "mlp": 688}
PROMPTS, GROUP, NEW = 4, 8, 128


def main():
    """Parses the command line; measures in turns, or is one of the processes."""
    parser = turns.parser(__doc__)
    turns.add_processes(parser, WORKERS, transformers="torch and transformers", tunix="google-tunix")
    parser.add_argument("--prompt-length", type=int, default=64, help="tokens of each prompt (default: 64)")
    args = parser.parse_args()
    if args.worker == "probe":
        print(json.dumps(probe()))
    elif args.worker:
        generate = WORKERS[args.worker](args)
        generate()  # compiles
        print(json.dumps(turns.seconds(generate, args.repeats)))
    else:
        report = measure(args)
        turns.publish(report, table(report), args.json)


def measure(args) -> dict:
    """All rounds: every library once in each, between probes."""
    pythons = {"alignax": sys.executable, "transformers": args.transformers, "tunix": args.tunix}
    options = ["--prompt-length", str(args.prompt_length), "--repeats", str(args.repeats)]
    runs = turns.processes(__file__, pythons, options)
    rounds = turns.rounds(runs, lambda: turns.process(sys.executable, __file__, "probe", []), args)
    return {"prompt_length": args.prompt_length, "rounds": rounds}


def probe() -> float:
    """GFLOP/s of a 2048-cubed float32 matrix product."""
    import timing

    return timing.probe()


def alignax_rollout(args):
    """One compiled program; the prompts are given once."""
    import functools

    import jax
    import jax.numpy as jnp
    import timing

    from alignax.sampling import generate

    model = timing.llama(SHAPE, max_positions=args.prompt_length + NEW)
    params = jax.jit(model.init)(jax.random.key(0))
    prompts = jax.random.randint(jax.random.key(1), (PROMPTS, args.prompt_length), 0, SHAPE["vocab"])
    sample = jax.jit(functools.partial(generate, model, max_new_tokens=NEW, group=GROUP))
    inputs = params, prompts, jnp.full(PROMPTS, args.prompt_length)
    return lambda: jax.block_until_ready(sample(*inputs, jax.random.key(2), temperature=1.0))


def transformers_rollout(args):
    """`generate` of the same shape; each prompt is given once for each completion."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers_peer

    model = transformers_peer.llama(SHAPE, args.prompt_length + NEW, "cpu", dtype=torch.float32, tied=False)
    prompts = torch.randint(0, SHAPE["vocab"], (PROMPTS, args.prompt_length)).repeat_interleave(GROUP, 0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}
    return torch.no_grad()(lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **options))


def tunix_rollout(args):
    """Its sampler, which takes text: words of one token each."""
    import tunix_peer
    import words
    from tunix.generate import sampler  # pyright: ignore[reportMissingImports]

    size = {"num_layers": SHAPE["layers"], "num_kv_heads": SHAPE["kv_heads"], "head_dim": SHAPE["head_dim"]}
    cache = sampler.CacheConfig(cache_size=args.prompt_length + NEW + 64, **size)
    engine = sampler.Sampler(tunix_peer.llama(SHAPE), words.tokenizer(SHAPE["vocab"]), cache)
    prompts = [words.text(SHAPE["vocab"], args.prompt_length - 1) for _ in range(PROMPTS)]
    prompts = [prompt for prompt in prompts for _ in range(GROUP)]
    options = {"max_generation_steps": NEW, "max_prompt_length": args.prompt_length, "temperature": 1.0, "top_p": 1.0}

    def generate():
        tokens = engine(prompts, seed=0, eos_tokens=[SHAPE["vocab"] - 1], **options).tokens
        return [x.block_until_ready() if hasattr(x, "block_until_ready") else x for x in tokens]

    return generate


WORKERS = {"alignax": alignax_rollout, "transformers": transformers_rollout, "tunix": tunix_rollout}


def table(report: dict) -> str:
    """The medians of the rounds that count, and their ratios to alignax."""
    rounds = report["rounds"]
    about = f"{PROMPTS} prompts of {report['prompt_length']} x {GROUP} completions of {NEW} tokens"
    lines, ratios = [f"{about}; {turns.tally(rounds)}"], turns.ratios(rounds, "alignax")
    for name, median in turns.medians(rounds).items():
        rate = PROMPTS * GROUP * NEW / median
        lines.append(f"{name:14}{median:8.3f} s{rate:10.0f} tokens/s{ratios[name]:7.2f} x alignax")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
