"""Group-relative policy optimisation: a Hugging Face folder, a file of prompts and a reward in, the aligned folder out.

    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward my_rewards.py:reward --output runs/grpo

A reward is a function `reward(prompts, completions, **columns) -> list[float]`: one of `REWARDS` below, or any in a
file of your own. It gets the columns of the data (a column may be renamed: `--columns question=prompt`), and
`truncated`, whether each completion was cut off. Results in the output folder: model/ (a Hugging Face folder),
metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import pathlib
import runpy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from alignax import advantages, data, losses, models, reduce, rewards, sampling, sharding, train
from alignax.algorithms import grpo
from alignax.data import text, truncation
from alignax.io import hf
from alignax.logprobs import token_logprobs
from alignax.types import Params

REWARDS = {"last_number": rewards.last_number}
TRUNCATIONS = {f.__name__: f for f in (truncation.keep_start, truncation.keep_end, truncation.drop, truncation.refuse)}
ADVANTAGES = {"group_relative": advantages.group_relative, "group_centred": advantages.group_centred}
KLS = {"none": None, "k2": losses.k2, "k3": losses.k3}
SHOW = ("reward", "kl", "length", "held_out/reward")
CURVES = ("reward", "held_out/reward", "kl", "held_out/kl", "length", "entropy", "clip_fraction", "truncated")


@dataclasses.dataclass(frozen=True)
class Config:
    """Group-relative policy optimisation."""

    model: str
    """Hugging Face folder, or id on the hub; also the first reference."""
    data: str
    """JSONL, JSON or Parquet file of prompts, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    reward: str
    """last_number (the answer's, as in GSM8K), or FILE.py:FUNCTION."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Columns of the data to rename, old name and new name."""
    steps: int = 100
    """Rollouts."""
    prompts: int = 8
    """Prompts of a rollout."""
    group: int = 8
    """Completions of each prompt."""
    epochs: int = 1
    """Passes over a rollout, each with a new permutation."""
    minibatches: int = 1
    """Updates of one pass."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    max_prompt_tokens: int = 256
    """Most tokens of a prompt."""
    truncate: Literal["keep_start", "keep_end", "drop", "refuse"] = "drop"
    """What becomes of longer prompts; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them; otherwise the first one is an error."""
    max_new_tokens: int = 128
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities trained on."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that hold this probability."""
    advantages: Literal["group_relative", "group_centred"] = "group_relative"
    """Whether rewards are divided by their group's standard deviation (GRPO) or only centred (Dr. GRPO)."""
    mean: Literal["sequence", "token", "constant"] = "sequence"
    """Mean over rows of each row's mean (GRPO), over tokens (DAPO), or by the constant max_new_tokens (Dr. GRPO)."""
    clip_low: float = 0.2
    """How far below 1 a ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a ratio counts."""
    kl: Literal["none", "k2", "k3"] = "k3"
    """Estimator of KL(policy || reference) in the loss; none needs no reference."""
    kl_weight: float = 0.04
    """Its weight (beta)."""
    ema_rate: float = 0.0
    """How far the reference follows the policy after each rollout; 0 keeps it fixed."""
    held_out: float = 0.1
    """Fraction of the prompts that is evaluated on and never trained on."""
    evaluate_every: int = 25
    """Rollouts between two evaluations."""
    evaluate_prompts: int = 64
    """Most held-out prompts of an evaluation, one completion of each."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup: int = 5
    """Updates over which the learning rate rises."""
    schedule: common.Schedule = "constant"
    """How it falls afterwards."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 clips nothing."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, losses and optimizer stay float32."""
    model_axis: int = 1
    """Devices over which each layer is split; the others take different rows."""
    seed: int = 0
    """Of the data order and of sampling."""


def find_reward(name: str) -> rewards.Reward:
    """A reward by name, or the function FUNCTION of the user's FILE.py."""
    if name in REWARDS:
        return REWARDS[name]
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not pathlib.Path(path).is_file():
        raise ValueError(
            f"--reward {name}: expected one of {sorted(REWARDS)}, or FILE.py:FUNCTION with a file there is"
        )
    found = runpy.run_path(path)
    if not callable(found.get(function)):
        raise ValueError(f"--reward {name}: {path} has no function {function!r}")
    return found[function]


def load_prompts(config: Config, tokenizer) -> tuple[list[data.TokenPrompt], list[data.TokenPrompt]]:
    """Prompts to train on and prompts held out; prints how many were left out, and why."""
    source = data.read(config.data)
    found, bad = data.parse(source, data.formats.prompts, columns=config.columns, drop=config.drop_bad_rows)
    cut = TRUNCATIONS[config.truncate]
    encode = partial(data.tokenize_prompt, tokenizer, limit=config.max_prompt_tokens, truncate=cut)
    kept, unfit = data.collect(encode, found, drop=config.drop_bad_rows)
    prompts, held_out = common.hold_out(config, kept, data.summary(kept, bad + unfit))
    return prompts, held_out[: config.evaluate_prompts]


def check_counts(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after a rollout."""
    if config.group < 2:
        raise ValueError(f"--group {config.group}: a group baseline needs at least 2 completions of each prompt")
    if config.epochs < 1 or config.minibatches < 1:
        raise ValueError(f"epochs={config.epochs}, minibatches={config.minibatches}; expected at least 1 of each")
    common.check(config, mesh, rows=config.prompts, parts=1)
    common.check(config, mesh, rows=config.prompts * config.group, parts=config.minibatches * config.microbatches)


class Functions(NamedTuple):
    """What is compiled, each once."""

    sample: Callable  # (params, tokens, lengths, key) -> Samples, a group for each prompt
    sample_one: Callable  # the same, one completion for each prompt
    score: Callable  # (params, samples) -> log-probabilities [R, T] by the trainer's arithmetic
    update: Callable  # (state, batch, frozen, hyper) -> state, metrics


def compile_functions(config: Config, loaded: hf.Loaded, optimizer: optax.GradientTransformation) -> Functions:
    """The sampler, the scorer and the update for one model."""
    model = loaded.model
    generate = partial(
        sampling.generate,
        model,
        max_new_tokens=config.max_new_tokens,
        eos_ids=loaded.eos_ids,
        temperature=config.temperature,
        top_p=config.top_p,
    )

    def score(params: Params, rows: sampling.Samples) -> jax.Array:
        return token_logprobs(model, params, rows.tokens, rows.segments, mask=rows.mask, temperature=config.temperature)

    means = {
        "sequence": reduce.sequence_mean,
        "token": reduce.token_mean,
        "constant": partial(reduce.constant_mean, constant=config.max_new_tokens),
    }
    loss_fn = grpo.make_loss(model, kl=KLS[config.kl], mean=means[config.mean])
    update = train.make_update(loss_fn, optimizer, microbatches=config.microbatches)
    return Functions(
        sample=jax.jit(partial(generate, group=config.group)),
        sample_one=jax.jit(generate),
        score=jax.jit(score),
        update=jax.jit(update, donate_argnums=0),
    )


def rollout_metrics(rows: sampling.Samples, scores: np.ndarray, counted: np.ndarray, group: int) -> dict[str, Any]:
    """What a rollout was like, over the rows that count."""
    spread = scores.reshape(-1, group).std(axis=1)[counted.reshape(-1, group)[:, 0]]
    return {
        "reward": scores[counted].mean(),
        "reward/std": scores[counted].std(),
        "frac_reward_zero_std": (spread == 0).mean(),
        "length": rows.lengths[counted].mean(),
        "truncated": rows.truncated[counted].mean(),
    }


def judge(
    reward: rewards.Reward, loaded: hf.Loaded, asked: dict, samples: sampling.Samples, group: int
) -> tuple[Sequence[str], np.ndarray]:
    """The texts of samples and their rewards, each with the prompt and the columns of its row."""
    completions = text.decode(loaded.tokenizer, samples.tokens, samples.mask, eos_ids=loaded.eos_ids)
    prompts = [prompt for prompt in asked["prompts"] for _ in range(group)]
    rows = [row for row in asked["columns"] for _ in range(group)]
    columns = {name: [row.get(name) for row in rows] for name in {name: None for row in rows for name in row}}
    columns["truncated"] = common.to_host(samples.truncated).tolist()
    return completions, rewards.evaluate(reward, prompts, completions, columns)


def evaluate(
    config: Config, loaded: hf.Loaded, functions: Functions, reward: rewards.Reward, params: Params, asked: dict
) -> tuple[dict[str, float], Sequence[str]]:
    """One completion of each held-out prompt: mean reward, KL to the model as it was loaded (k1), and the texts."""
    key = jax.random.key(config.seed + 1)  # the same every time, so that evaluations differ by the policy alone
    rows = functions.sample_one(params, asked["tokens"], asked["lengths"], key)
    difference = functions.score(params, rows) - functions.score(loaded.params, rows)
    completions, scores = judge(reward, loaded, asked, rows, 1)
    values = {
        "reward": scores.mean(),
        "kl": reduce.sequence_sum(difference, rows.mask).value(),
        "length": rows.lengths.mean(),
        "truncated": rows.truncated.mean(),
    }
    return {f"held_out/{name}": float(value) for name, value in values.items()}, completions


def main(config: Config) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    reward = find_reward(config.reward)
    run = common.Run(config.output, config, total=config.steps, show=SHOW, curves=CURVES)
    mesh = sharding.make_mesh(data=-1, model=config.model_axis)
    check_counts(config, mesh)
    loaded = hf.load(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    prompts, held_out = load_prompts(config, loaded.tokenizer)
    # one width for all prompts: it is part of the sampler's and the update's compiled shapes
    width = max(prompt.length for prompt in [*prompts, *held_out])
    batches = partial(data.batches, collate=data.batching.prompts, buckets=[width])
    updates = config.epochs * config.minibatches  # of one rollout
    schedule = {"steps": config.steps * updates, "warmup": config.warmup, "schedule": config.schedule}
    optimizer = common.make_optimizer(config.learning_rate, max_grad_norm=config.max_grad_norm, **schedule)
    state = common.create_state(loaded.params, optimizer, mesh, models.RULES, seed=config.seed)
    reference, follow = loaded.params, jax.jit(train.ema)
    functions = compile_functions(config, loaded, optimizer)
    hyper = {name: getattr(config, name) for name in ("kl_weight", "temperature", "clip_low", "clip_high")}
    ((questions, _),) = batches(held_out, batch_size=len(held_out), seed=None, epochs=1)
    check = partial(evaluate, config, loaded, functions, reward, asked=questions)

    result, completions = check(state.params)
    common.print_samples("before", questions["prompts"][:4], completions[:4])
    with run:
        run.log(0, result)
        stream = batches(prompts, batch_size=config.prompts, seed=config.seed)
        for step in range(1, config.steps + 1):
            sample_key, order_key = jax.random.split(jax.random.fold_in(state.key, step))
            asked, _ = next(stream)
            placed = sharding.shard_batch((asked["tokens"], asked["lengths"]), mesh)
            rows = functions.sample(state.params, *placed, sample_key)
            _, scores = judge(reward, loaded, asked, rows, config.group)
            counted = np.repeat(asked["weights"], config.group) > 0  # not the rows that fill up an epoch's last batch
            rollout = grpo.Batch(
                rows.tokens,
                rows.segments,
                rows.mask,
                advantages=ADVANTAGES[config.advantages](jnp.asarray(scores).reshape(-1, config.group)).reshape(-1),
                # by the trainer's arithmetic, not the sampler's; a rollout's only update needs none: its ratio is 1
                old_logp=None if updates == 1 else functions.score(state.params, rows),
                ref_logp=None if config.kl == "none" else functions.score(reference, rows),
                weights=jnp.asarray(counted, jnp.float32),
            )
            parts = []
            for epoch in range(config.epochs):
                for part in train.minibatches(jax.random.fold_in(order_key, epoch), rollout, config.minibatches):
                    state, metrics = functions.update(state, sharding.shard_batch(part, mesh), None, hyper)
                    parts.append(metrics)
            metrics = {name: jnp.mean(jnp.stack([part[name] for part in parts])) for name in parts[0]}
            if config.ema_rate > 0:
                reference = follow(reference, state.params, rate=config.ema_rate)
            metrics |= rollout_metrics(rows, scores, counted, config.group)
            if step % config.evaluate_every == 0 or step == config.steps:
                result, completions = check(state.params)
                metrics |= result
            run.log(step, metrics)
    common.print_samples("after", questions["prompts"][:4], completions[:4])
    hf.save(config.output / "model", loaded.model, state.params, loaded.tokenizer)
    before, after = run.history["held_out/reward"][0][1], result["held_out/reward"]
    print(f"held-out reward {before:.3f} -> {after:.3f} at KL {result['held_out/kl']:.2f}; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
