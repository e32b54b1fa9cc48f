"""Learning from answers said to be good or bad: a Hugging Face folder and a file of labelled answers in, a folder out.

    python experiments/kto.py --model FOLDER --data answers.jsonl --output runs/kto --loss kto --beta 0.1

Answers are in any format of sft.py with one more column, `label`: true for a good answer, false for a bad one. Pairs as
preference.py takes them are read as one good and one bad answer each. An answer that was cut off when it was sampled
gets no EOS: say so in a column truncated. The reference is the model as it was loaded. Where one class is rarer, raise
its weight: the script prints what the two classes weigh. Results in the output folder: model/ (a Hugging Face folder),
metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import itertools
import pathlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import checks
import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import packed
import records
import running
import suspects
import tyro

from alignax import data, losses, models, sharding, train
from alignax.algorithms import kto
from alignax.io import hf
from alignax.types import Model

LOSSES = {"kto": losses.kto, "bco": losses.bco, "apo_zero_unpaired": losses.apo_zero_unpaired}
WEIGHTS = {"kto": ("desirable_weight", "undesirable_weight"), "bco": ("undesirable_weight",), "apo_zero_unpaired": ()}
SHOW = ("loss", "rewards/margins", "held_out/rewards/margins")
CURVES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "delta", "held_out/loss")
CURVES += ("held_out/rewards/margins",)


@dataclasses.dataclass(frozen=True)
class Config(running.Options):
    """Learning from answers said to be good or bad."""

    model: str
    """Hugging Face folder, or id on the hub; also the reference."""
    data: str
    """JSONL, JSON or Parquet file, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    loss: Literal["kto", "bco", "apo_zero_unpaired"] = "kto"
    """The loss of a single answer."""
    beta: float = 0.1
    """How strongly the reference holds."""
    desirable_weight: float = 1.0
    """For kto: of good answers."""
    undesirable_weight: float = 1.0
    """For kto and bco: of bad answers."""
    label: str = "label"
    """The column that says whether an answer is good."""
    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Answers of an update; kto needs at least 2, and 8 or more are wise."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    pack: int = 0
    """Tokens of a row in which short answers stand together, `limit` or more; 0 packs nothing. An update then has about
    `batch_size` of them."""
    limit: int = 512
    """Most tokens of a row, prompt included."""
    truncate: common.Truncate = "drop"
    """What becomes of longer rows; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them; otherwise the first one is an error."""
    held_out: float = 0.1
    """Fraction of the rows that is evaluated on and never trained on."""
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
    seed: int = 0
    """Of the data order and of sampling."""


def tokenize(tokenizer, row: data.Example | data.Pair, *, label: str, **options) -> list[data.TokenLabelled]:
    """The rows of a labelled answer, or of a pair; an EOS ends those that ended by themselves."""
    if isinstance(row, data.Pair):
        pair = data.tokenize_pair(tokenizer, row, **options)
        return [data.TokenLabelled(pair.chosen, True), data.TokenLabelled(pair.rejected, False)]
    ended = not row.columns.get("truncated", False)
    return [data.tokenize_labelled(tokenizer, row, label=label, eos=ended, **options)]


def load_rows(config: Config, tokenizer) -> tuple[list[data.TokenLabelled], list[data.TokenLabelled]]:
    """Tokenised answers to train on and held out; prints how many were left out, and why. Pairs stay together."""
    rows, bad = data.parse(data.read(config.data), drop=config.drop_bad_rows)
    if not isinstance(rows[0] if rows else None, data.Example | data.Pair):
        raise ValueError(f"{config.data}: no answers; expected prompt and completion, or messages, and {config.label}")
    options = {"label": config.label, "limit": config.limit, "truncate": common.TRUNCATIONS[config.truncate]}
    found, unfit = data.collect(partial(tokenize, tokenizer, **options), rows, drop=config.drop_bad_rows)
    split = common.hold_out(config, found, data.summary(found, bad + unfit))
    training, held_out = (list(itertools.chain.from_iterable(part)) for part in split)
    return training, held_out


def prompt_of(row: data.TokenLabelled) -> np.ndarray:
    """What the answer continues."""
    return row.row.tokens[: max(1, int(row.row.mask.argmax()))]


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after minutes; the loss gets its numbers traced, where it can refuse nothing."""
    if not config.beta > 0:
        raise ValueError(f"beta={config.beta}; expected a number above 0")
    for name in WEIGHTS["kto"]:
        if getattr(config, name) != 1 and name not in WEIGHTS[config.loss]:
            raise ValueError(f"{name}={getattr(config, name)}; {config.loss} has no such weight, expected 1")
    if config.loss == "kto" and config.batch_size < 2:
        raise ValueError(
            f"batch_size={config.batch_size}; expected at least 2: kto pairs each prompt with another row's answer"
        )
    least = {"desirable_weight": 0, "undesirable_weight": 0, "learning_rate": 0, "weight_decay": 0, "limit": 4}
    checks.check_ranges(config, least=least)
    checks.check(config, mesh, rows=config.batch_size, parts=config.microbatches)
    packed.check(config)


def print_balance(config: Config, rows: list[data.TokenLabelled]) -> None:
    """What the good rows weigh against the bad ones; warns outside of the range that KTO's authors recommend."""
    good = sum(row.desirable for row in rows)
    bad = len(rows) - good
    ratio = good * config.desirable_weight / (bad * config.undesirable_weight) if bad * config.undesirable_weight else 0
    said = f"{good} good and {bad} bad answers; by their weights good : bad = {ratio:.3f}"
    print(said if ratio else f"{good} good and {bad} bad answers, of which one class weighs nothing")
    if config.loss == "kto" and ratio and not 1 <= ratio <= 4 / 3 + 1e-9:
        low, high = (limit * bad * config.undesirable_weight / good for limit in (1, 4 / 3))
        warnings.warn(
            f"{said}; KTO's authors recommend 1 to 4/3, a desirable_weight of {low:.3g} to {high:.3g}", stacklevel=2
        )


def print_cut_off(batches) -> None:
    """The share of the mismatched answers' tokens that did not fit beside another prompt, in one epoch."""
    counts = [[batch[name].sum() for name in ("mask", "mismatched_mask")] for batch, _ in batches]
    own, mismatched = np.sum(counts, axis=0)
    print(f"mismatched rows: {1 - mismatched / own:.1%} of their answers cut off")


def by_class(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """The metrics as floats: without those of a class that is missing, or with the difference of both rewards."""
    values = {name: float(value) for name, value in common.to_host(metrics).items()}
    absent = {0.0: "/chosen", 1.0: "/rejected"}.get(values["desirable_fraction"])
    if absent:
        return {name: value for name, value in values.items() if not name.endswith(absent)}
    return values | {"rewards/margins": values["rewards/chosen"] - values["rewards/rejected"]}


def hyperparameters(config: Config) -> dict[str, float]:
    """Of the loss; for bco also delta, from 0 on, and how far an update moves it."""
    weights = {name: getattr(config, name) for name in WEIGHTS[config.loss]}
    return {"beta": config.beta} | weights | ({"delta": 0.0, "delta_rate": 1.0} if config.loss == "bco" else {})


def make_steps(
    config: Config, model: Model, optimizer: optax.GradientTransformation, packing: packed.Packing
) -> tuple[Callable, Callable, Callable | None]:
    """The compiled update and measurement, and for kto that of the KL."""
    make_loss = partial(kto.make_loss, loss=LOSSES[config.loss])
    make_statistics = partial(kto.make_statistics, loss=LOSSES[config.loss])
    loss_fn, statistics = packing.loss(make_loss, model), packing.loss(make_statistics, model)
    update = train.make_update(loss_fn, optimizer, microbatches=config.microbatches, statistics=statistics)
    measure_kl = make_statistics(model) if config.loss == "kto" else None
    measures = jax.jit(train.make_measure(make_loss(model))), None if measure_kl is None else jax.jit(measure_kl)
    return sharding.in_place(update), *measures


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    check(config, mesh)
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    checks.check_context(loaded, "limit", config.limit)
    rows, held_out = load_rows(config, loaded.tokenizer)
    print_balance(config, rows)
    collate = data.batching.unpaired if config.loss == "kto" else data.batching.labelled
    buckets = [config.limit // 4, config.limit // 2, config.limit]
    batches = partial(data.batches, collate=collate, batch_size=config.batch_size, buckets=buckets)
    packing = packed.arrange(config, rows, batches, mesh)
    if config.loss == "kto":
        print_cut_off(packing.stream(batches, rows, seed=config.seed, epochs=1))

    optimizer = common.optimizer_of(config)
    state = common.create_state(loaded.params, optimizer, mesh, models.RULES, seed=config.seed)
    frozen, hyper = {"reference": loaded.params}, hyperparameters(config)
    update, measure, measure_kl = make_steps(config, loaded.model, optimizer, packing)
    show = common.make_show(loaded, [prompt_of(row) for row in held_out[:4]])

    def place(batch):
        return sharding.shard_batch(kto.Batch(**batch), mesh)

    def evaluate() -> dict[str, float]:
        everything = [place(batch) for batch, _ in batches(held_out, seed=None, epochs=1)]
        known = hyper  # delta is that of training; kl is that of the held-out rows
        if measure_kl is not None:
            known = hyper | train.merge(measure_kl(state.params, batch, frozen, hyper) for batch in everything)
        values = by_class(train.merge(measure(state.params, batch, frozen, known) for batch in everything))
        return common.held_out_metrics(values, loss="loss/rows")

    with run:
        start = {"state": state, "position": data.batching.Position(), "hyper": hyper, "seen": 0.0}
        saved = run.resume(start, unsaved={"model": loaded.params, "rows": rows})
        state, position, hyper, seen, result = *(saved[name] for name in start), run.latest("held_out/")
        if run.step == 0:
            show("before", state.params, state.key)
            result = run.log(0, evaluate())
        stream = packing.stream(batches, rows, seed=config.seed, start=position)
        for step, (batch, position) in zip(range(run.step + 1, config.steps + 1), stream):
            if config.loss == "bco":  # the mean reward of all rows so far moves by this batch's share of them
                counted = float(batch["weights"].sum())
                seen += counted
                hyper["delta_rate"] = counted / seen
            state, metrics = update(state, place(batch), frozen, hyper)
            metrics = by_class(metrics)
            if config.loss == "bco":
                hyper["delta"] = metrics["delta"]
            if step % config.evaluate_every == 0 or step == config.steps:
                result = evaluate()
                metrics |= result
            run.log(step, metrics, partial(suspects.of_batch, loaded, state.params, batch, position))
            run.save(step, {"state": state, "position": position, "hyper": hyper, "seen": seen})
        show("after", state.params, state.key)
        hf.save(records.cleared(config.output / "model"), loaded.model, state.params, loaded.tokenizer)
        result = run.finish(result)
    print(", ".join(f"{name} {value:.4f}" for name, value in result.items()) + f"; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
