"""Group-relative policy optimisation: a Hugging Face folder, a file of prompts and a reward in, the aligned folder out.

    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward my_rewards.py:reward --output runs/grpo

A reward is a function `reward(prompts, completions, **columns) -> list[float]`: one of `rollouts.REWARDS`, or any in a
file of your own. It gets the columns of the data (a column may be renamed: `--columns question=prompt`), and
`truncated`, whether each completion was cut off. Results in the output folder: model/ (a Hugging Face folder),
metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import rollouts
import tyro

from alignax import advantages, data, losses, models, reduce, sharding, train
from alignax.algorithms import grpo
from alignax.io import hf
from alignax.types import LossFn, Model

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


def check_counts(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after a rollout."""
    if config.group < 2:
        raise ValueError(f"--group {config.group}: a group baseline needs at least 2 completions of each prompt")
    if config.epochs < 1 or config.minibatches < 1:
        raise ValueError(f"epochs={config.epochs}, minibatches={config.minibatches}; expected at least 1 of each")
    least = {"ema_rate": 0, "clip_low": 0, "clip_high": 0, "kl_weight": 0, "evaluate_prompts": 1, "max_new_tokens": 1}
    common.check_ranges(config, least=least, most={"ema_rate": 1, "clip_low": 1})
    common.check(config, mesh, rows=config.prompts, parts=1)
    common.check(config, mesh, rows=config.prompts * config.group, parts=config.minibatches * config.microbatches)


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss function that the configuration names."""
    means = {
        "sequence": reduce.sequence_mean,
        "token": reduce.token_mean,
        "constant": partial(reduce.constant_mean, constant=config.max_new_tokens),
    }
    return grpo.make_loss(model, kl=KLS[config.kl], mean=means[config.mean])


def fraction_without_spread(scores: np.ndarray, counted: np.ndarray, group: int) -> float:
    """The fraction of the groups whose rewards are all equal, and which teach nothing."""
    return float((scores.reshape(-1, group).std(axis=1)[counted.reshape(-1, group)[:, 0]] == 0).mean())


def main(config: Config) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    summands = [rollouts.rule(config.reward, 1.0)]
    run = common.Run(config.output, config, total=config.steps, show=SHOW, curves=CURVES)
    mesh = sharding.make_mesh(data=-1, model=config.model_axis)
    check_counts(config, mesh)
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    prompts, held_out = rollouts.load_prompts(config, loaded.tokenizer)
    # one width for all prompts: it is part of the sampler's and the update's compiled shapes
    width = max(prompt.length for prompt in [*prompts, *held_out])
    batches = partial(data.batches, collate=data.batching.prompts, buckets=[width])
    updates = config.epochs * config.minibatches  # of one rollout
    schedule = {"steps": config.steps * updates, "warmup": config.warmup, "schedule": config.schedule}
    optimizer = common.make_optimizer(config.learning_rate, max_grad_norm=config.max_grad_norm, **schedule)
    state = common.create_state(loaded.params, optimizer, mesh, models.RULES, seed=config.seed)
    reference, follow, sampler = loaded.params, jax.jit(train.ema), rollouts.make_sampler(config, loaded)
    update = train.make_update(make_loss(config, loaded.model), optimizer, microbatches=config.microbatches)
    update, place = jax.jit(update, donate_argnums=0), partial(sharding.shard_batch, mesh=mesh)
    hyper = {name: getattr(config, name) for name in ("kl_weight", "temperature", "clip_low", "clip_high")}
    ((questions, _),) = batches(held_out, batch_size=len(held_out), seed=None, epochs=1)
    evaluate = rollouts.make_evaluate(config, loaded, sampler, summands, questions)

    result, completions = evaluate(state.params)
    common.print_samples("before", questions["prompts"][:4], completions[:4])
    with run:
        run.log(0, result)
        stream = batches(prompts, batch_size=config.prompts, seed=config.seed)
        for step in range(1, config.steps + 1):
            sample_key, order_key = jax.random.split(jax.random.fold_in(state.key, step))
            asked, _ = next(stream)
            rows = sampler.sample(state.params, *place((asked["tokens"], asked["lengths"])), sample_key)
            verdict = rollouts.judge(summands, loaded, asked, rows, config.group)
            grouped = jnp.asarray(verdict.reward).reshape(-1, config.group)
            counted = np.repeat(asked["weights"], config.group) > 0  # not the rows that fill up an epoch's last batch
            rollout = grpo.Batch(
                rows.tokens,
                rows.segments,
                rows.mask,
                advantages=ADVANTAGES[config.advantages](grouped).reshape(-1),
                # by the trainer's arithmetic, not the sampler's; a rollout's only update needs none: its ratio is 1
                old_logp=None if updates == 1 else sampler.logp(state.params, rows),
                ref_logp=None if config.kl == "none" else sampler.logp(reference, rows),
                weights=jnp.asarray(counted, jnp.float32),
            )
            parts = []
            for part in rollouts.passes(order_key, rollout, epochs=config.epochs, minibatches=config.minibatches):
                state, metrics = update(state, place(part), None, hyper)
                parts.append(metrics)
            metrics = rollouts.mean_of(parts)
            if config.ema_rate > 0:
                reference = follow(reference, state.params, rate=config.ema_rate)
            metrics |= rollouts.rollout_metrics(rows, verdict, counted)
            metrics["frac_reward_zero_std"] = fraction_without_spread(verdict.reward, counted, config.group)
            if step % config.evaluate_every == 0 or step == config.steps:
                result, completions = evaluate(state.params)
                metrics |= result
            run.log(step, metrics)
    common.print_samples("after", questions["prompts"][:4], completions[:4])
    hf.save(config.output / "model", loaded.model, state.params, loaded.tokenizer)
    before, after = run.history["held_out/reward"][0][1], result["held_out/reward"]
    print(f"held-out reward {before:.3f} -> {after:.3f} at KL {result['held_out/kl']:.2f}; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
