"""Learning from preference pairs: a Hugging Face folder and a file of pairs in, the aligned folder out.

    python experiments/preference.py --model FOLDER --data pairs.jsonl --output runs/dpo --loss dpo --beta 0.1
    python experiments/preference.py --model FOLDER --data pairs.jsonl --output runs/simpo --loss simpo --hyper gamma 1

`alignax/losses/README.md` has every loss with its formula, `pairwise.OBJECTIVES` their names here. Pairs have the
columns prompt, chosen, rejected; the prompt may also be the beginning that both sides share, and all may be texts or
conversations (`alignax.data.formats`). A side that was cut off when it was sampled gets no EOS: say so in
the columns chosen_truncated and rejected_truncated. Some losses read more columns: odpo `margin`, dpo_soft and ipo_soft
`preference` (the probability that the chosen side is preferred), the reward-aware RPOs `chosen_reward` and
`rejected_reward`, sppo `chosen_win_rate` and `rejected_win_rate`, mdpo `degraded_prompt`. bco_pair and mpo keep their
delta where it is, at 0 unless `--hyper delta` says otherwise, as TRL does. The reference is the model as it was loaded,
unless `--reference` says that it follows. Results in the output folder: model/ (a Hugging Face folder), metrics.jsonl,
TensorBoard scalars, curves.png, config.json.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import adapters
import checks
import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import packed
import pairwise
import running
import sharing
import suspects
import tyro

from alignax import data, losses, models, sharding, train
from alignax.algorithms import preference
from alignax.data import reference_cache
from alignax.io import digests, hf
from alignax.types import Model

SHOW = ("loss", "rewards/accuracies", "held_out/rewards/accuracies")
CURVES = ("loss", "rewards/accuracies", "rewards/margins", "held_out/loss", "held_out/rewards/accuracies")


@dataclasses.dataclass(frozen=True)
class Config(adapters.Options, running.Options):
    """Learning from preference pairs."""

    model: str
    """Hugging Face folder, or id on the hub; also the reference."""
    data: str
    """JSONL, JSON or Parquet file, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    loss: str = "dpo"
    """The pairwise loss: dpo, robust_dpo, ipo, hinge, exo_pair, apo_zero, nca_pair, aot, sppo_hard, simpo, orpo, ...
    (any of `pairwise.OBJECTIVES`; a wrong name lists them)."""
    beta: float | None = None
    """How strongly the reference holds; the loss's own default unless given."""
    hyper: dict[str, float] = dataclasses.field(default_factory=dict)
    """The loss's other hyperparameters, name and number, such as `label_smoothing 0.1`; its defaults unless given."""
    nll_weight: float | None = None
    """Weight of the supervised summand (RPO, CPO, ORPO, MPO); the loss's own unless given, and 0 for none."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"] = "reverse_kl"
    """What holds the policy to the reference (f-DPO), for losses that are functions of log-ratios."""
    divergence_alpha: float | None = None
    """For the alpha-divergence: from 0, the reverse KL, to 1, the forward one; 0.5 unless given."""
    wpo: bool = False
    """Weigh each pair by how likely the policy finds it, as if it were on-policy (WPO)."""
    reference: Literal["fixed", "soft", "hard", "ema", "sdpo"] = "fixed"
    """fixed; TR-DPO: mixed with the policy (soft) or replaced by it (hard) every `reference_every` updates; mixed at
    every update (ema); replaced, with a new optimizer state, at each part of the data, in file order (sdpo)."""
    reference_every: int = 512
    """Updates between two changes of the reference."""
    reference_rate: float = 0.6
    """How far it moves towards the policy, for soft and ema."""
    stages: int = 2
    """Parts of the data, for sdpo."""
    precompute_reference: bool = False
    """Compute the reference's log-probabilities once, before training, and hold no reference in memory afterwards."""
    cache_reference: pathlib.Path | None = None
    """The same, kept in this .safetensors file for later runs; refused for another model, tokenizer or other pairs."""
    steps: int = 200
    """Updates."""
    batch_size: int = 16
    """Pairs of an update."""
    microbatches: int = 1
    """Parts into which an update is split to save memory; the result is the same."""
    pack: int = 0
    """Tokens of a row in which short pairs stand together, twice `limit` or more; 0 packs nothing. An update then has
    about `batch_size` of them."""
    share_prompts: bool = True
    """Run the beginning that both sides share through the network once, where that saves a tenth of the tokens; the
    same result. Not where pairs are packed, and not for mdpo."""
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
    optimizer_bits: Literal[32, 16, 8] = 32
    """Of AdamW's moments: float32, bfloat16, or eight bits with a scale for each block."""
    offload: bool = False
    """Keep AdamW's moments in the host's memory; each update fetches them, leaf by leaf."""
    seed: int = 0
    """Of the data order and of sampling."""


def tokenize(tokenizer, pair: data.Pair, **options) -> data.TokenPair:
    """The rows of a pair; an EOS ends the sides that ended by themselves."""
    ended = data.tokenize_pair(tokenizer, pair, **options)
    cut_off = [pair.columns.get(f"{side}_truncated") or False for side in data.TokenPair._fields]
    for side, cut in zip(data.TokenPair._fields, cut_off, strict=True):
        if cut not in (True, False):  # a text, "false" too, would count as true
            raise data.BadRow(pair.where, f"wrong {side}_truncated", f"{cut!r}; expected true or false")
    if not any(cut_off):
        return ended
    bare = data.tokenize_pair(tokenizer, pair, eos=False, **options)
    return data.TokenPair(*[bare[side] if cut else ended[side] for side, cut in enumerate(cut_off)])


def load_pairs(config: Config, tokenizer, names: tuple[str, ...]) -> tuple[list, list]:
    """Tokenised pairs to train on and pairs held out, with the extras of these names; prints what was left out."""
    pairs, bad = data.parse(data.read(config.data), drop=config.drop_bad_rows)
    if not isinstance(pairs[0] if pairs else None, data.Pair):
        raise ValueError(f"{config.data}: no preference pairs; expected columns chosen and rejected, and maybe prompt")
    options = {"limit": config.limit, "truncate": common.TRUNCATIONS[config.truncate]}
    encode = partial(tokenize, tokenizer, **options)

    def row(pair: data.Pair) -> pairwise.PairRow:
        degraded = pairwise.read_degraded(encode, pair) if "degraded_logp" in names else None
        return pairwise.PairRow(encode(pair=pair), pairwise.read_extras(pair, names), degraded)

    rows, unfit = data.collect(row, pairs, drop=config.drop_bad_rows)
    train_rows, held_out = common.hold_out(config, rows, data.summary(rows, bad + unfit))
    if config.reference != "sdpo":
        return train_rows, held_out
    if config.stages > len(train_rows):
        raise ValueError(f"stages={config.stages}; expected at most the {len(train_rows)} pairs to train on")
    order = {id(row): number for number, row in enumerate(rows)}
    return sorted(train_rows, key=lambda row: order[id(row)]), held_out


def prompt_of(row: pairwise.PairRow) -> np.ndarray:
    """What both completions continue."""
    chosen = row.pair.chosen
    return chosen.tokens[: max(1, int(chosen.mask.argmax()))]


def check_loss(config: Config, mesh: jax.sharding.Mesh) -> tuple[pairwise.Objective, dict[str, float]]:
    """The objective and its hyperparameters, which reach it traced, where it can refuse nothing: all is tried here."""
    options = {"divergence": config.divergence, "alpha": config.divergence_alpha, "wpo": config.wpo}
    objective = pairwise.objective(config.loss, **options)
    known = checks.keywords(objective.loss)
    hyper = checks.merge_hyper(config.hyper, {"beta": config.beta}, known, f"--loss {config.loss}")
    if not hyper.get("beta", 1) > 0:
        raise ValueError(f"beta={hyper['beta']}; expected a number above 0")
    pairwise.try_out(objective.loss, hyper)
    checks.check(config, mesh, rows=config.batch_size, parts=config.microbatches)
    packed.check(config, sides=2)
    adapters.check(config, moves="" if config.reference == "fixed" else f"reference={config.reference!r}")
    if config.pack and config.loss in ("beta_dpo", "mdpo"):
        raise ValueError(f"pack={config.pack}: {config.loss} needs more than the rows of the pairs; expected 0")
    least = {"nll_weight": 0, "reference_every": 1, "reference_rate": 0, "stages": 1}
    most = {"reference_rate": 1} | ({"stages": config.steps} if config.reference == "sdpo" else {})
    checks.check_ranges(config, least=least, most=most)
    if config.reference != "fixed" and not objective.reference:
        raise ValueError(f"reference={config.reference!r}: {config.loss} has no reference; expected fixed")
    check_cached(config, objective)
    if config.microbatches > 1 and losses.needs_whole_batch(objective.loss):
        raise ValueError(f"microbatches={config.microbatches}: {config.loss} compares all pairs of a batch; expected 1")
    weight = objective.nll_weight if config.nll_weight is None else config.nll_weight or None
    return objective._replace(nll_weight=weight), hyper | pairwise.STILL.get(config.loss, {})


def check_cached(config: Config, objective: pairwise.Objective) -> None:
    """Refuses to keep log-probabilities of a reference that moves, or that do not say all a loss needs to know."""
    if not (config.precompute_reference or config.cache_reference):
        return
    said = (
        "precompute_reference" if config.cache_reference is None else f"cache_reference={str(config.cache_reference)!r}"
    )
    if not objective.reference:
        raise ValueError(f"{said}: {config.loss} has no reference")
    if config.reference != "fixed":
        raise ValueError(f"{said}: the reference moves, reference={config.reference!r}; expected fixed")
    if more := {"forward_kl", "degraded_logp"} & set(losses.needed(objective.loss)):
        raise ValueError(f"{said}: {config.loss} needs {sorted(more)}, not only log-probabilities of the pairs")


def place_pairs(
    batch: Mapping[str, Any], mesh: jax.sharding.Mesh, known: reference_cache.Rows | None = None
) -> preference.Batch:
    """A batch on the devices, with what is known of the reference."""
    batch = batch if known is None else reference_cache.fill(batch, known)
    return sharding.shard_batch(preference.Batch(**batch), mesh)


def reference_rows(
    config: Config, loaded: hf.Loaded, batches: Callable, mesh: jax.sharding.Mesh
) -> reference_cache.Rows | None:
    """What the reference says of all pairs: computed, or read from the file if there is one; None unless asked for.

    `batches()` gives every pair once. A pair that the file lacks is an error now, not in the middle of the run.
    """
    file = config.cache_reference
    if not (config.precompute_reference or file):
        return None
    key = None if file is None else reference_cache.key(loaded.params, loaded.tokenizer, loaded.model.config)
    if file is not None and key is not None and file.exists():
        rows = reference_cache.read(file, key)
    else:
        logprobs = jax.jit(partial(preference.logprobs, loaded.model))
        everything = (batch for batch, _ in batches())
        rows = reference_cache.collect(lambda batch: logprobs(loaded.params, place_pairs(batch, mesh)), everything)
        if file is not None and key is not None:
            reference_cache.write(file, key, rows)
    for batch, _ in batches():
        reference_cache.fill(batch, rows)
    print(f"reference: log-probabilities of {len(rows)} completions" + (f"; {file}" if file else ""))
    return rows


def make_steps(
    config: Config,
    objective: pairwise.Objective,
    model: Model,
    optimizer: optax.GradientTransformation,
    packing: packed.Packing,
    trained: adapters.Adapters,
) -> tuple[Callable, Callable, Callable | None]:
    """The compiled update for each `completion` of `sharing`, the measurement, and what prepares a batch."""
    chosen = {name: value for name, value in objective._asdict().items() if name != "reference"}
    make_loss = partial(preference.make_loss, **chosen)
    make_statistics: Callable = preference.make_statistics if config.loss == "kto_pair" else lambda _: None

    @functools.cache
    def update(completion: int) -> Callable:
        network = sharing.network(model, completion)
        loss_fn, statistics = (trained.loss(packing.loss(f, network, sides=2)) for f in (make_loss, make_statistics))
        found = train.make_update(loss_fn, optimizer, microbatches=config.microbatches, statistics=statistics)
        return sharding.in_place(found)

    loss_fn, statistics = (trained.loss(make(model)) for make in (make_loss, make_statistics))
    measure = train.make_measure(loss_fn, statistics=statistics)
    prepare = pairwise.make_dynamic_beta(model) if config.loss == "beta_dpo" else None
    return update, jax.jit(measure), prepare


def stages(config: Config, pairs: list) -> list[tuple[list, int, int]]:
    """Each part of the data with the numbers of updates before and after it: one part, but for sDPO."""
    count = config.stages if config.reference == "sdpo" else 1
    edges = [round(stage * len(pairs) / count) for stage in range(count + 1)]
    steps = [round(stage * config.steps / count) for stage in range(count + 1)]
    return [(pairs[a:b], c, d) for a, b, c, d in zip(edges, edges[1:], steps, steps[1:])]


def training(
    config: Config, packing: packed.Packing, batches: partial, pairs: list, done: int, position: data.batching.Position
) -> Iterator[tuple[int, bool, data.batching.Batch, data.batching.Position]]:
    """Each update behind those done: its number, whether it begins a stage but the first, its batch, the position."""
    for rows, first, last in stages(config, pairs):
        start = position if first < done else data.batching.Position()
        stream = packing.stream(batches, rows, seed=config.seed, start=start)
        for step, (batch, after) in zip(range(max(first, done) + 1, last + 1), stream):
            yield step, 0 < first == step - 1, batch, after


def next_stage(
    state: train.TrainState, optimizer: optax.GradientTransformation
) -> tuple[dict[str, Any], train.TrainState]:
    """Of sDPO: what was learned becomes the reference, and the optimizer begins anew."""
    kept = jax.tree.map(lambda x: x.sharding, state.opt_state)
    state = state._replace(opt_state=jax.device_put(optimizer.init(state.params), kept))
    return {"reference": jax.tree.map(jnp.copy, state.params)}, state


def moving(config: Config, frozen: Mapping[str, Any] | None) -> dict[str, Any]:
    """The reference, where it is another in each run: what a checkpoint has to hold of it."""
    return {} if config.reference == "fixed" or frozen is None else dict(frozen)


def make_optimizer(config: Config, pairs: list) -> optax.GradientTransformation:
    """That of a stage: each of sDPO's has a schedule of its own."""
    config = dataclasses.replace(config, steps=max(last - first for _, first, last in stages(config, pairs)))
    return common.optimizer_of(config, bits=config.optimizer_bits, offload=config.offload)


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    objective, hyper = check_loss(config, mesh)
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    checks.check_context(loaded, "limit", config.limit)
    computes = objective.reference and not (config.precompute_reference or config.cache_reference)
    trained = adapters.arrange(config, loaded, reference=computes)
    pairs, held_out = load_pairs(config, loaded.tokenizer, losses.needed(objective.loss))
    buckets = [config.limit // 4, config.limit // 2, config.limit]
    batches = partial(data.batches, collate=pairwise.collate, batch_size=config.batch_size, buckets=buckets)
    packing = packed.arrange(config, [row.pair for row in pairs], batches, mesh)
    shared = sharing.arrange(config, pairs, batches)

    known = reference_rows(config, loaded, partial(batches, pairs + held_out, seed=None, epochs=1), mesh)
    place = partial(place_pairs, mesh=mesh, known=known)
    optimizer, options = make_optimizer(config, pairs), {"seed": config.seed, "offload": config.offload}
    state = common.create_state(trained.initial(loaded.params), optimizer, mesh, models.RULES, **options)
    frozen = {"reference": loaded.params} if computes else None
    unsaved = {"model": digests.of_tree(loaded.params), "pairs": pairs}
    loaded = loaded._replace(params=None)  # so that nothing holds what nothing reads
    update, measure, prepare = make_steps(config, objective, loaded.model, optimizer, packing, trained)
    follow = jax.jit(partial(train.ema_every, **pairwise.schedule(config)))
    show = common.make_show(loaded, [prompt_of(row) for row in held_out[:4]])

    def evaluate() -> dict[str, jax.Array]:
        everything = (place(batch) for batch, _ in batches(held_out, seed=None, epochs=1))
        values = train.merge(measure(state.params, batch, trained.frozen(frozen), hyper) for batch in everything)
        return common.held_out_metrics(values, loss="loss/pairs")

    with run:
        start = {"state": state, "moments": (jnp.zeros(()),) * 2, "position": data.batching.Position()}
        saved = run.resume(start | moving(config, frozen), unsaved=unsaved)
        state, moments, done = (saved.pop(name) for name in start)
        frozen, result = saved or frozen, run.latest("held_out/")
        if run.step == 0:
            show("before", trained.whole(state.params), state.key)
            result = run.log(0, evaluate())
        for step, begins, batch, position in training(config, packing, batches, pairs, run.step, done):
            if begins:
                frozen, state = next_stage(state, optimizer)
            batch, completion = shared.arrange(batch)
            batch, now = place(batch), trained.hyper(hyper, state)
            if prepare is not None:
                whole = state._replace(params=trained.whole(state.params))
                batch, now, moments = prepare(whole, batch, frozen, now, moments)
            state, metrics = update(completion)(state, batch, trained.frozen(frozen), now)
            if step % config.evaluate_every == 0 or step == config.steps:
                result = evaluate()  # before the reference moves: against itself a policy has no margins
                metrics |= result
            if config.reference in ("soft", "hard", "ema") and step % pairwise.schedule(config)["every"] == 0:
                frozen = {"reference": follow(frozen["reference"], state.params, state.step)}
            run.log(step, metrics, partial(suspects.of_batch, loaded, state.params, batch, position, trained.whole))
            run.save(step, {"state": state, "moments": moments, "position": position} | moving(config, frozen))
        show("after", trained.whole(state.params), state.key)
        trained.save(config.output, loaded, state.params, config.model)
        result = run.finish(result)
    common.print_accuracy(result["held_out/rewards/accuracies"], len(held_out), config.output)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
