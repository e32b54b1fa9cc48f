"""A reward model from preference pairs: a Hugging Face folder and a file of pairs in, a scoring folder out.

    python experiments/reward_model.py --model FOLDER --data pairs.jsonl --output runs/reward

FOLDER is a language model, whose body gets a new scalar head, or a reward model to go on from. Pairs are those of
preference.py. A column `margin` says by how much the chosen score should win (Llama 2: 1, 2/3, 1/3, 0 by rating), a
column `preference` with which probability the chosen side is the preferred one. Results in the output folder: model/
(a ...ForSequenceClassification folder of one label), metrics.jsonl, TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import pathlib
from functools import partial
from typing import NamedTuple

import checks
import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import packed
import preference
import records
import running
import suspects
import tyro

from alignax import data, models, sharding, train
from alignax.algorithms import reward_model
from alignax.io import hf

SHOW = ("loss", "rewards/accuracies", "held_out/rewards/accuracies")
CURVES = ("loss", "rewards/accuracies", "rewards/margins", "held_out/loss", "held_out/rewards/accuracies")


@dataclasses.dataclass(frozen=True)
class Config(running.Options):
    """A reward model from preference pairs."""

    model: str
    """Hugging Face folder, or id on the hub: a language model, or a reward model."""
    data: str
    """JSONL, JSON or Parquet file, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    centering_weight: float = 0.01
    """How strongly the scores of a pair are pulled to a mean of 0."""
    label_smoothing: float = 0.0
    """The probability that a label is wrong, where the data has no column `preference`."""
    steps: int = 200
    """Updates; one pass over the data is usual, reward models overfit."""
    batch_size: int = 32
    """Pairs of an update."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    pack: int = 0
    """Tokens of a row in which short pairs stand together, twice `limit` or more; 0 packs nothing. An update then has
    about `batch_size` of them."""
    limit: int = 512
    """Most tokens of one side, prompt included."""
    truncate: common.Truncate = "drop"
    """What becomes of pairs with a longer side; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out pairs that cannot be used, and count them; otherwise the first one is an error."""
    held_out: float = 0.1
    """Fraction of the pairs that is evaluated on and never trained on."""
    evaluate_every: int = 50
    """Updates between two evaluations."""
    learning_rate: float = 1e-5
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
    """Of the new head and the data order."""


class Ranked(NamedTuple):
    """A pair with what its annotator said of it."""

    pair: data.TokenPair
    margin: float
    preference: float

    @property
    def length(self) -> int:
        """Of the longer side, in tokens."""
        return self.pair.length


def rank(tokenizer, pair: data.Pair, *, preferred: float, **options) -> Ranked:
    """A pair's rows, with its columns `margin` and `preference` where it has them."""
    given = {"margin": 0.0, "preference": preferred} | pair.columns
    for name in ("margin", "preference"):
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise data.BadRow(pair.where, f"wrong {name}", f"{value!r}; expected a number")
    if not 0.5 <= given["preference"] <= 1:
        found = f"{given['preference']}; expected a probability of at least 0.5, or the sides the other way round"
        raise data.BadRow(pair.where, "wrong preference", found)
    sides = [up_to_the_end(side) for side in preference.tokenize(tokenizer, pair, **options)]
    return Ranked(data.TokenPair(*sides), given["margin"], given["preference"])


def up_to_the_end(row: data.TokenRow) -> data.TokenRow:
    """The row without what follows its last own token: a template may write a line end after EOS, a sampler does not.

    The score is read at the last token, which must be the one that a sampled row ends on.
    """
    end = int(np.flatnonzero(row.mask)[-1]) + 1
    return data.TokenRow(row.tokens[:end], row.mask[:end])


def collate(rows: list[Ranked], weights: np.ndarray, **options) -> dict:
    """The arrays of `reward_model.Batch`."""
    arrays = data.batching.pairs([row.pair for row in rows], weights, **options)
    said = {name: np.array([getattr(row, name) for row in rows], np.float32) for name in ("margin", "preference")}
    return {name: arrays[name] for name in ("tokens", "segments", "weights")} | said


def load_pairs(config: Config, tokenizer) -> tuple[list[Ranked], list[Ranked]]:
    """Pairs to train on and pairs held out; prints how many were left out, and why."""
    pairs, bad = data.parse(data.read(config.data), drop=config.drop_bad_rows)
    if not isinstance(pairs[0] if pairs else None, data.Pair):
        raise ValueError(f"{config.data}: no preference pairs; expected columns chosen and rejected, and maybe prompt")
    options = {"limit": config.limit, "truncate": common.TRUNCATIONS[config.truncate]}
    encode = partial(rank, tokenizer, preferred=1.0 - config.label_smoothing, **options)
    rows, unfit = data.collect(encode, pairs, drop=config.drop_bad_rows)
    return common.hold_out(config, rows, data.summary(rows, bad + unfit))


def load_scored(config: Config, mesh: jax.sharding.Mesh) -> hf.Loaded:
    """The reward model of a folder, or its language model with a new head."""
    loaded = hf.load(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    if loaded.model.values is not None:
        return loaded
    params = models.add_score(loaded.model, loaded.params, jax.random.key(config.seed))
    return loaded._replace(model=models.with_score(loaded.model), params=params)


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after minutes."""
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={config.label_smoothing}; expected 0 to below 0.5")
    checks.check_ranges(config, least={"centering_weight": 0, "learning_rate": 0, "weight_decay": 0, "limit": 4})
    checks.check(config, mesh, rows=config.batch_size, parts=config.microbatches)
    packed.check(config, sides=2)


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    check(config, mesh)
    loaded = load_scored(config, mesh)
    checks.check_context(loaded, "limit", config.limit)
    pairs, held_out = load_pairs(config, loaded.tokenizer)
    buckets = [config.limit // 4, config.limit // 2, config.limit]
    batches = partial(data.batches, collate=collate, batch_size=config.batch_size, buckets=buckets)
    packing = packed.arrange(config, [row.pair for row in pairs], batches, mesh)

    optimizer = common.optimizer_of(config)
    state = common.create_state(loaded.params, optimizer, mesh, models.RULES, seed=config.seed)
    hyper = {"centering_weight": config.centering_weight}
    loss_fn = reward_model.make_loss(loaded.model)
    packed_loss = packing.loss(reward_model.make_loss, loaded.model, sides=2)
    update = sharding.in_place(train.make_update(packed_loss, optimizer, microbatches=config.microbatches))
    measure = jax.jit(train.make_measure(loss_fn))

    def place(batch):
        return sharding.shard_batch(reward_model.Batch(**batch), mesh)

    def evaluate() -> dict[str, jax.Array]:
        everything = batches(held_out, seed=None, epochs=1)
        values = train.merge(measure(state.params, place(batch), None, hyper) for batch, _ in everything)
        return common.held_out_metrics(values, loss="loss/pairs")

    with run:
        start = {"state": state, "position": data.batching.Position()}
        saved = run.resume(start, unsaved={"pairs": pairs})
        state, position, result = saved["state"], saved["position"], run.latest("held_out/")
        if run.step == 0:
            result = run.log(0, evaluate())
        stream = packing.stream(batches, pairs, seed=config.seed, start=position)
        for step, (batch, position) in zip(range(run.step + 1, config.steps + 1), stream):
            state, metrics = update(state, place(batch), None, hyper)
            if step % config.evaluate_every == 0 or step == config.steps:
                result = evaluate()
                metrics |= result
            run.log(step, metrics, partial(suspects.of_batch, loaded, state.params, batch, position))
            run.save(step, {"state": state, "position": position})
        hf.save(records.cleared(config.output / "model"), loaded.model, state.params, loaded.tokenizer)
        result = run.finish(result)
    common.print_accuracy(result["held_out/rewards/accuracies"], len(held_out), config.output)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
