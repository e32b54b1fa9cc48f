"""Learning from preference pairs: a Hugging Face folder and a file of pairs in, the aligned folder out.

    python experiments/preference.py --model FOLDER --data pairs.jsonl --output runs/dpo --loss dpo --beta 0.1

Pairs have the columns prompt, chosen, rejected; the prompt may also be the beginning that both sides share, and all may
be texts or conversations (`alignax.data.formats`). A side that was cut off when it was sampled gets no EOS: say so in
the columns chosen_truncated and rejected_truncated. The reference is the model as it was loaded. Results in the output
folder: model/ (a Hugging Face folder), metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import itertools
import pathlib
from functools import partial
from typing import Literal

import common
import jax
import jax.numpy as jnp
import numpy as np
import tyro

from alignax import data, losses, models, sharding, train
from alignax.algorithms import preference
from alignax.data import truncation
from alignax.io import hf

LOSSES = {"dpo": losses.dpo, "ipo": losses.ipo, "ipo_average": losses.ipo_average}
TRUNCATIONS = {f.__name__: f for f in (truncation.keep_start, truncation.keep_end, truncation.drop, truncation.refuse)}
SHOW = ("loss", "rewards/accuracies", "held_out/rewards/accuracies")
CURVES = ("loss", "rewards/accuracies", "rewards/margins", "held_out/loss", "held_out/rewards/accuracies")


@dataclasses.dataclass(frozen=True)
class Config:
    """Learning from preference pairs."""

    model: str
    """Hugging Face folder, or id on the hub; also the reference."""
    data: str
    """JSONL, JSON or Parquet file, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    loss: Literal["dpo", "ipo", "ipo_average"] = "dpo"
    """The pairwise loss."""
    beta: float = 0.1
    """How strongly the reference holds."""
    label_smoothing: float = 0.0
    """For dpo: the probability that a label is wrong."""
    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Pairs of an update."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    limit: int = 512
    """Most tokens of one side, prompt included."""
    truncate: Literal["keep_start", "keep_end", "drop", "refuse"] = "drop"
    """What becomes of pairs with a longer side; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out pairs that cannot be used, and count them; otherwise the first one is an error."""
    held_out: float = 0.1
    """Fraction of the pairs that is evaluated on and never trained on."""
    evaluate_every: int = 50
    """Updates between two evaluations."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup: int = 10
    """Updates over which the learning rate rises."""
    schedule: common.Schedule = "linear"
    """How it falls afterwards."""
    weight_decay: float = 0.0
    """AdamW's weight decay; none on biases and norms."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 clips nothing."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, losses and optimizer stay float32."""
    model_axis: int = 1
    """Devices over which each layer is split; the others take different pairs."""
    seed: int = 0
    """Of the data order and of sampling."""


def tokenize(tokenizer, pair: data.Pair, **options) -> data.TokenPair:
    """The rows of a pair; an EOS ends the sides that ended by themselves."""
    ended = data.tokenize_pair(tokenizer, pair, **options)
    cut_off = [pair.columns.get(f"{side}_truncated", False) for side in data.TokenPair._fields]
    if not any(cut_off):
        return ended
    bare = data.tokenize_pair(tokenizer, pair, eos=False, **options)
    return data.TokenPair(*[bare[side] if cut else ended[side] for side, cut in enumerate(cut_off)])


def load_pairs(config: Config, tokenizer) -> tuple[list[data.TokenPair], list[data.TokenPair]]:
    """Tokenised pairs to train on and pairs held out; prints how many were left out, and why."""
    pairs, bad = data.parse(data.read(config.data), drop=config.drop_bad_rows)
    if not isinstance(pairs[0] if pairs else None, data.Pair):
        raise ValueError(f"{config.data}: no preference pairs; expected columns chosen and rejected, and maybe prompt")
    encode = partial(tokenize, tokenizer, limit=config.limit, truncate=TRUNCATIONS[config.truncate])
    rows, unfit = data.collect(encode, pairs, drop=config.drop_bad_rows)
    return common.hold_out(config, rows, data.summary(rows, bad + unfit))


def prompt_of(pair: data.TokenPair) -> np.ndarray:
    """What both completions continue."""
    return pair.chosen.tokens[: max(1, int(pair.chosen.mask.argmax()))]


def check_loss(config: Config) -> None:
    """The loss's hyperparameters reach it traced, where it can refuse nothing."""
    if config.beta <= 0:
        raise ValueError(f"beta={config.beta}; expected a number above 0")
    if config.label_smoothing and (config.loss != "dpo" or not 0 <= config.label_smoothing < 0.5):
        raise ValueError(
            f"label_smoothing={config.label_smoothing}; expected 0 to below 0.5, and 0 for any loss but dpo"
        )


def main(config: Config) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    check_loss(config)
    run = common.Run(config.output, config, total=config.steps, show=SHOW, curves=CURVES)
    hyper = {"beta": config.beta} | ({"label_smoothing": config.label_smoothing} if config.label_smoothing else {})
    mesh = sharding.make_mesh(data=-1, model=config.model_axis)
    common.check(config, mesh, rows=config.batch_size, parts=config.microbatches)
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    if config.limit > loaded.model.config.max_positions:
        raise ValueError(
            f"limit={config.limit}; expected at most {loaded.model.config.max_positions}, the model's context"
        )
    pairs, held_out = load_pairs(config, loaded.tokenizer)
    buckets = [config.limit // 4, config.limit // 2, config.limit]
    batches = partial(data.batches, collate=data.batching.pairs, batch_size=config.batch_size, buckets=buckets)
    print("training pairs:", data.batching.statistics(pairs, batch_size=config.batch_size, buckets=buckets))

    optimizer = common.make_optimizer(
        config.learning_rate,
        steps=config.steps,
        warmup=config.warmup,
        schedule=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )
    state = common.create_state(loaded.params, optimizer, mesh, models.RULES, seed=config.seed)
    frozen = {"reference": loaded.params}
    loss_fn = preference.make_loss(loaded.model, loss=LOSSES[config.loss])
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=config.microbatches), donate_argnums=0)
    measure = jax.jit(train.make_measure(loss_fn))
    show = common.make_show(loaded, [prompt_of(row) for row in held_out[:4]])

    def place(batch):
        return sharding.shard_batch(preference.Batch(**batch), mesh)

    def evaluate() -> dict[str, jax.Array]:
        everything = batches(held_out, seed=None, epochs=1)
        values = train.merge(measure(state.params, place(batch), frozen, hyper) for batch, _ in everything)
        names = {"held_out/loss": "loss/pairs"} | {f"held_out/{n}": n for n in values if n.startswith("rewards/")}
        return {new: values[old] for new, old in names.items()}

    show("before", state.params, state.key)
    with run:
        result = run.log(0, evaluate())
        for step, (batch, _) in enumerate(itertools.islice(batches(pairs, seed=config.seed), config.steps), start=1):
            state, metrics = update(state, place(batch), frozen, hyper)
            if step % config.evaluate_every == 0 or step == config.steps:
                result = evaluate()
                metrics |= result
            run.log(step, metrics)
    show("after", state.params, state.key)
    hf.save(config.output / "model", loaded.model, state.params, loaded.tokenizer)
    result = {name: float(value) for name, value in result.items()}
    accuracy = result["held_out/rewards/accuracies"]
    error = (accuracy * (1 - accuracy) / len(held_out)) ** 0.5
    print(f"held-out accuracy {accuracy:.3f} +- {error:.3f} over {len(held_out)} pairs; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
