"""Supervised fine-tuning of a Hugging Face folder on a file of text, and the tuned folder back.

    python experiments/sft.py --model FOLDER --data stories.jsonl --output runs/sft

The data are texts, prompts with completions, or conversations (`alignax.data.formats`); the columns tell which. Results
in the output folder: model/ (a Hugging Face folder), metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import pathlib
from functools import partial
from typing import Literal

import adapters
import checks
import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import packed
import running
import suspects
import tyro

from alignax import data, losses, models, sharding, train
from alignax.algorithms import sft
from alignax.types import LossFn, Model

LOSSES = {"cross_entropy": losses.cross_entropy, "dft": losses.dft}
SHOW = ("loss", "held_out/loss")
CURVES = ("loss", "held_out/loss", "mean_token_accuracy", "held_out/accuracy", "grad_norm")


@dataclasses.dataclass(frozen=True)
class Config(adapters.Options, running.Options):
    """Supervised fine-tuning."""

    model: str
    """Hugging Face folder, or id on the hub."""
    data: str
    """JSONL, JSON, Parquet or text file, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Rows of an update."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    pack: int = 0
    """Tokens of a row in which short rows stand together, `limit` or more; 0 packs nothing. An update then has about
    `batch_size` of them."""
    limit: int = 512
    """Most tokens of a row."""
    truncate: common.Truncate = "drop"
    """What becomes of longer rows; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them; otherwise the first one is an error."""
    every_turn: bool = False
    """In conversations, train on every assistant turn, not only on the last."""
    loss: Literal["cross_entropy", "dft"] = "cross_entropy"
    """Objective: the likelihood of the tokens, or that weighed by their probability (dynamic fine-tuning)."""
    label_smoothing: float = 0.0
    """Probability that the cross-entropy's target is any token of the vocabulary; below 1."""
    z_weight: float = 0.0
    """Weight of the z-loss, which keeps the logits from drifting, 1e-4 where it was published; 0 leaves it out."""
    aux_weight: float = 0.0
    """For a mixture of experts: the weight of its load-balancing loss, over each micro-batch; 0 leaves it out."""
    held_out: float = 0.05
    """Fraction of the rows that is evaluated on and never trained on."""
    evaluate_every: int = 50
    """Updates between two evaluations."""
    learning_rate: float = 2e-5
    """Peak learning rate of AdamW."""
    warmup: int = 10
    """Updates over which the learning rate rises."""
    schedule: common.Schedule = "cosine"
    """How it falls afterwards."""
    weight_decay: float = 0.0
    """AdamW's weight decay; none on biases and norms."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 clips nothing."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, losses and optimizer stay float32."""
    seed: int = 0
    """Of the data order and of sampling."""


def check_objective(config: Config) -> None:
    """Refuses options of the loss that mean nothing.

    Raises:
      ValueError: for numbers out of range, or smoothed labels of a loss that has none.
    """
    checks.check_ranges(config, least={"label_smoothing": 0, "z_weight": 0, "aux_weight": 0})
    if not config.label_smoothing < 1:
        raise ValueError(f"label_smoothing={config.label_smoothing}; expected less than 1, which forgets the tokens")
    if config.label_smoothing and config.loss != "cross_entropy":
        raise ValueError(f"label_smoothing={config.label_smoothing} with loss={config.loss}; expected cross_entropy")


def make_loss(config: Config, model: Model) -> LossFn:
    """The objective that the options name."""
    loss = LOSSES[config.loss]
    if config.label_smoothing:
        loss = partial(losses.smoothed_cross_entropy, label_smoothing=config.label_smoothing)
    return sft.make_loss(model, loss=loss, z_loss_weight=config.z_weight or None, aux_weight=config.aux_weight or None)


def load_rows(config: Config, tokenizer) -> tuple[list[data.TokenRow], list[data.TokenRow]]:
    """Tokenised rows to train on and rows held out; prints how many were left out, and why."""
    examples, bad = data.parse(data.read(config.data), drop=config.drop_bad_rows)
    if not isinstance(examples[0] if examples else None, data.Example):
        raise ValueError(f"{config.data}: no texts; expected columns text, prompt and completion, or messages")
    encode = partial(
        data.tokenize_example,
        tokenizer,
        limit=config.limit,
        truncate=common.TRUNCATIONS[config.truncate],
        every_turn=config.every_turn,
    )
    rows, unfit = data.collect(encode, examples, drop=config.drop_bad_rows)
    return common.hold_out(config, rows, data.summary(rows, bad + unfit))


def prompt_of(row: data.TokenRow) -> np.ndarray:
    """What comes before a row's completion, or the first token of a row that is all text."""
    return row.tokens[: max(1, int(row.mask.argmax()))]


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    checks.check(config, mesh, rows=config.batch_size, parts=config.microbatches)
    check_objective(config)
    packed.check(config)
    adapters.check(config)
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    checks.check_context(loaded, "limit", config.limit)
    if config.aux_weight and not loaded.model.config.mixture:
        raise ValueError(f"aux_weight={config.aux_weight}: {config.model} has no router; expected a mixture of experts")
    trained = adapters.arrange(config, loaded)
    rows, held_out = load_rows(config, loaded.tokenizer)
    buckets = [config.limit // 4, config.limit // 2, config.limit]
    batches = partial(data.batches, collate=data.batching.supervised, batch_size=config.batch_size, buckets=buckets)
    packing = packed.arrange(config, rows, batches, mesh)

    optimizer = common.optimizer_of(config)
    state = common.create_state(trained.initial(loaded.params), optimizer, mesh, models.RULES, seed=config.seed)
    loss_fn = trained.loss(packing.loss(partial(make_loss, config), loaded.model))
    update = sharding.in_place(train.make_update(loss_fn, optimizer, microbatches=config.microbatches))
    likelihood = trained.loss(sft.make_loss(loaded.model))  # whatever is trained on
    measure = jax.jit(train.make_measure(likelihood))
    show = common.make_show(loaded, [prompt_of(row) for row in held_out[:4]])

    def place(batch):
        return sharding.shard_batch(sft.Batch(**batch), mesh)

    def evaluate() -> dict[str, jax.Array]:
        everything = batches(held_out, seed=None, epochs=1)
        values = train.merge(measure(state.params, place(batch), trained.frozen()) for batch, _ in everything)
        return {"held_out/loss": values["loss/nll"], "held_out/accuracy": values["mean_token_accuracy"]}

    with run:
        start = {"state": state, "position": data.batching.Position()}
        saved = run.resume(start, unsaved={"base": trained.base, "rows": rows})
        state, position, result = saved["state"], saved["position"], run.latest("held_out/")
        if run.step == 0:
            show("before", trained.whole(state.params), state.key)
            result = run.log(0, evaluate())
        stream = packing.stream(batches, rows, seed=config.seed, start=position)
        for step, (batch, position) in zip(range(run.step + 1, config.steps + 1), stream):
            state, metrics = update(state, place(batch), trained.frozen(), trained.hyper({}, state))
            if step % config.evaluate_every == 0 or step == config.steps:
                result = evaluate()
                metrics |= result
            run.log(step, metrics, partial(suspects.of_batch, loaded, state.params, batch, position, trained.whole))
            run.save(step, {"state": state, "position": position})
        show("after", trained.whole(state.params), state.key)
        trained.save(config.output, loaded, state.params, config.model)
        result = run.finish(result)
    print(f"held-out loss {run.history['held_out/loss'][0][1]:.4f} -> {result['held_out/loss']:.4f}; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
