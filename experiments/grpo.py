"""Group-relative policy optimisation: a Hugging Face folder, a file of prompts and a reward in, the aligned folder out.

    python experiments/grpo.py --model FOLDER --data prompts.jsonl --reward my_rewards.py:reward --output runs/grpo

A reward is a function `reward(prompts, completions, **columns) -> list[float]`: one of `rollouts.REWARDS`, or any in a
file of your own. It gets the columns of the data (a column may be renamed: `--columns question=prompt`), and
`truncated`, whether each completion was cut off. Results in the output folder: model/ (a Hugging Face folder),
metrics.jsonl, TensorBoard scalars, curves.png, config.json.

Any advantage goes with any policy loss, mean and correction. What papers call
  DAPO      is --mean token --clip-high 0.28 --kl none --filter-groups --overlong-cache 16,
  Dr. GRPO  is --advantages group_centred --mean constant --kl none,
  RLOO      is --advantages leave_one_out --policy-loss rloo,
  GSPO      is --policy-loss gspo --kl none,
  CISPO     is --policy-loss cispo --mean token --hyper ratio_max 5 --kl none.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import actors
import adapters
import checks
import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import policy_losses
import rollouts
import running
import suspects
import tyro
from policy_losses import POLICY_LOSSES, PolicyLoss

from alignax import advantages, ahead, corrections, data, layouts, losses, models, reduce, rewards, sharding, train
from alignax.algorithms import grpo
from alignax.logprobs import token_logprobs
from alignax.types import LossFn, Model

Advantages = Literal[
    "group_relative", "group_relative_batch", "group_centred", "leave_one_out", "opo", "reinforce_plus_plus_baseline"
]
Correction = Literal[
    "none", "truncated_is_token", "truncated_is_sequence", "truncated_is_geometric", "masked_is_token",
    "masked_is_sequence", "icepop", "geometric_rejection",
]  # fmt: skip
KL = Literal["none", "k2", "k3", "k3_straight_through"]
ADVANTAGES: dict[str, Callable] = {name: getattr(advantages, name) for name in get_args(Advantages)}
CORRECTIONS: dict[str, Callable | None] = {name: getattr(corrections, name, None) for name in get_args(Correction)}
KLS: dict[str, Callable | None] = {name: getattr(losses, name, None) for name in get_args(KL)}
SHOW = ("reward", "kl", "length", "held_out/reward")
CURVES = ("reward", "held_out/reward", "kl", "held_out/kl", "length", "entropy", "clip_fraction", "truncated")


@dataclasses.dataclass(frozen=True)
class Config(actors.Options, adapters.Options, rollouts.Options, running.Options):
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
    truncate: common.Truncate = "drop"
    """What becomes of longer prompts; dropped ones are counted, refused ones are an error."""
    drop_bad_rows: bool = False
    """Leave out rows that cannot be used, and count them; otherwise the first one is an error."""
    max_new_tokens: int = 128
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities trained on."""
    advantages: Advantages = "group_relative"
    """What a completion's reward is compared with, and divided by: see `alignax.advantages`."""
    policy_loss: PolicyLoss = "ppo_clip"
    """What is minimised: see `alignax.losses`, policy_gradient.py and sequence_policy.py."""
    mean: Literal["sequence", "sequence_sum", "token", "constant"] = "sequence"
    """Mean over rows of each row's mean (GRPO) or sum, over tokens (DAPO), or by the constant max_new_tokens (Dr.)."""
    clip_low: float | None = None
    """How far below 1 a ratio counts; None: as the policy loss was published."""
    clip_high: float | None = None
    """How far above 1 a ratio counts; None: as the policy loss was published."""
    hyper: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other hyperparameters of the policy loss, and of the correction as correction_NAME: name and value."""
    correction: Correction = "none"
    """Weights for what the sampler's arithmetic makes of the policy: see `alignax.corrections`."""
    filter_groups: bool = False
    """Leave out groups whose rewards are all equal, also in means and in the KL (DAPO's dynamic sampling)."""
    overlong_cache: int = 0
    """Last tokens before max_new_tokens over which a penalty grows from 0 to -1 (DAPO); 0 is none."""
    off_policy_threshold: float = 0.0
    """Leave out bad completions whose average log-probability has fallen by more than this; 0 leaves out none."""
    entropy_weight: float = 0.0
    """Weight of an entropy bonus; 0 is none."""
    kl: KL = "k3"
    """Estimator of KL(policy || reference) in the loss; none needs no reference."""
    kl_weight: float = 0.04
    """Its weight (beta)."""
    unbiased_kl: bool = False
    """Multiply it by the ratio of new and old policy, whose gradient is then that of the KL (DeepSeek-V3.2); for k3."""
    share_prompts: bool = True
    """Run a prompt through the network once for its group, where that saves a tenth of the tokens; the same result, but
    minibatches then hold whole groups."""
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
    seed: int = 0
    """Of the data order and of sampling."""


def check_counts(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after a rollout."""
    if config.group < 2:
        raise ValueError(f"--group {config.group}: a group baseline needs at least 2 completions of each prompt")
    if config.unbiased_kl and config.kl != "k3":
        raise ValueError(f"unbiased_kl with --kl {config.kl}; expected k3, which the ratio makes unbiased")
    if config.epochs < 1 or config.minibatches < 1:
        raise ValueError(f"epochs={config.epochs}, minibatches={config.minibatches}; expected at least 1 of each")
    policy_losses.check(config.policy_loss, config.epochs, config.minibatches)
    rollouts.check_options(config)
    actors.check(config)
    adapters.check(config, moves=f"ema_rate={config.ema_rate}" if config.ema_rate else "")
    if not config.temperature > 0:
        raise ValueError(f"temperature={config.temperature}; expected a number above 0")
    least = {"ema_rate": 0, "kl_weight": 0, "evaluate_prompts": 1, "max_new_tokens": 1}
    least |= dict.fromkeys(("clip_low", "clip_high", "overlong_cache", "entropy_weight", "off_policy_threshold"), 0)
    most = {"ema_rate": 1, "clip_low": 1, "overlong_cache": config.max_new_tokens}
    checks.check_ranges(config, least=least, most=most)
    checks.check(config, mesh, rows=config.prompts, parts=1)
    checks.check(config, mesh, rows=config.prompts * config.group, parts=config.minibatches * config.microbatches)


def hyperparameters(config: Config) -> dict[str, float]:
    """What the update is told at every call, the policy loss's and the correction's own included.

    Raises:
      ValueError: for a name that neither has, or a value that one refuses.
    """
    prefix, correction = "correction_", CORRECTIONS[config.correction]
    of_correction = {name: value for name, value in config.hyper.items() if name.startswith(prefix)}
    known = [prefix + name for name in checks.keywords(correction)] if correction else []
    of_correction = checks.merge_hyper(of_correction, {}, known, f"--correction {config.correction}")
    if correction:
        x = -jnp.ones((2, 1))
        correction(x, x, x != 0, **{name.removeprefix(prefix): value for name, value in of_correction.items()})
    own = {name: value for name, value in config.hyper.items() if not name.startswith(prefix)}
    if "kl_weight" in own:
        raise ValueError("hyper kl_weight: the reference's here; expected --kl-weight")
    own = policy_losses.hyperparameters(config.policy_loss, own, clip_low=config.clip_low, clip_high=config.clip_high)
    optional = {name: getattr(config, name) for name in ("entropy_weight", "off_policy_threshold")}
    optional = {name: value for name, value in optional.items() if value}
    return {"kl_weight": config.kl_weight, "temperature": config.temperature} | optional | own | of_correction


def make_loss(config: Config, model: Model) -> LossFn:
    """The loss function that the configuration names."""
    means = {
        "sequence": reduce.sequence_mean,
        "sequence_sum": reduce.sequence_sum,
        "token": reduce.token_mean,
        "constant": partial(reduce.constant_mean, constant=config.max_new_tokens),
    }
    return grpo.make_loss(
        model,
        policy_loss=POLICY_LOSSES[config.policy_loss],
        kl=KLS[config.kl],
        unbiased_kl=config.unbiased_kl,
        entropy_weight=config.entropy_weight or None,
        correction=CORRECTIONS[config.correction],
        off_policy_threshold=config.off_policy_threshold or None,
        mean=means[config.mean],
    )


def completions_together(config: Config, prompts: rollouts.Prompts, mesh: jax.sharding.Mesh) -> int:
    """How many rows run through the network with their prompt once: a group, or 1 where it does not pay or divide."""
    width = max(prompt.length for prompt in [*prompts.train, *prompts.held_out])  # all are padded to it
    gain = layouts.shared_prompt_gain(width, config.max_new_tokens, config.group)
    parts = config.minibatches * config.microbatches * sharding.row_devices(mesh)
    if not config.share_prompts or gain < 1.1 or config.prompts % parts:
        return 1
    print(f"in updates a prompt runs once for its {config.group} completions: {gain:.1f} times fewer tokens")
    return config.group


def make_logp(config: Config, model: Model, together: int) -> Callable[[Any, Any], jax.Array]:
    """The scorer of a rollout's rows [R, T], on as many bundles of rows at once as an update takes."""

    def logp(params: Any, rows: Any) -> jax.Array:
        tokens, segments, mask = (x.reshape(-1, x.shape[-1]) for x in rows)
        found = token_logprobs(model, params, tokens, segments, mask=mask, temperature=config.temperature)
        return found.reshape(-1, together, found.shape[1])

    def of_rows(params: Any, rows: Any) -> jax.Array:
        bundles = in_bundles((rows.tokens, rows.segments, rows.mask), together)
        return scored(params, bundles).reshape(rows.tokens.shape)

    scored = train.in_parts(logp, max(1, rollouts.rows_at_once(config) // together))
    return jax.jit(of_rows)


def make_steps(
    config: Config, model: Model, optimizer: optax.GradientTransformation, trained: adapters.Adapters, together: int
) -> tuple[Callable, Callable]:
    """The compiled update and the scorer, of bundles of as many rows as run together."""
    share = {"members": together, "completion": config.max_new_tokens}
    model = layouts.shared_prompt(model, **share) if together > 1 else model
    loss_fn = trained.loss(layouts.bundled(make_loss(config, model)))
    update = train.make_update(loss_fn, optimizer, microbatches=config.microbatches)
    return sharding.in_place(update), make_logp(config, model, together)


def in_bundles(rows: Any, together: int) -> Any:
    """Leaves [R, ...] as [R / together, together, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, together, *x.shape[1:]), rows)


def advantages_of(name: str, grouped: jax.Array, mask: jax.Array) -> jax.Array:
    """Advantages [R] or [R, T] of rewards [P, G]; some also want the lengths or the mask [R, T] of the rows."""
    mask = mask.reshape(*grouped.shape, -1)
    wanted = {"opo": (jnp.sum(mask, axis=2),), "reinforce_plus_plus_baseline": (mask,)}.get(name, ())
    found = ADVANTAGES[name](grouped, *wanted)
    return found.reshape(-1, *found.shape[2:])


def compare(config: Config, reward: Any, rows: Any, real: Any) -> tuple[jax.Array, jax.Array, dict]:
    """Advantages, weights of the rows, and metrics; what is not `real` only fills up an epoch's last batch."""
    grouped = jnp.where(real, reward, jnp.nan).reshape(-1, config.group)
    differ = jnp.repeat(advantages.informative_groups(grouped), config.group)
    metrics = {"frac_reward_zero_std": 1 - jnp.mean(differ, where=real)}
    weights = real & differ if config.filter_groups else jnp.asarray(real)
    if config.overlong_cache:
        penalty = rewards.soft_overlong(rows.lengths, max_length=config.max_new_tokens, cache=config.overlong_cache)
        grouped += penalty.reshape(grouped.shape)
        metrics["overlong_penalty"] = jnp.mean(penalty, where=real)
    return advantages_of(config.advantages, grouped, rows.mask), weights.astype(jnp.float32), metrics


def make_learn(
    config: Config,
    model: Model,
    optimizer: optax.GradientTransformation,
    trained: adapters.Adapters,
    prompts: rollouts.Prompts,
    mesh: jax.sharding.Mesh,
) -> Callable[..., tuple[train.TrainState, dict[str, Any]]]:
    """Makes `learn(state, reference, policy, weights, rows, reward, key) -> (state, metrics)`: a rollout's updates.

    Its `weights` [P] are those of the prompts, 0 for what only fills up an epoch's last batch.
    """
    hyper, updates = hyperparameters(config), config.epochs * config.minibatches
    together = completions_together(config, prompts, mesh)
    update, logp = make_steps(config, model, optimizer, trained, together)
    place, compared = partial(sharding.shard_batch, mesh=mesh), jax.jit(partial(compare, config))

    def learn(state, reference, policy, weights, rows, reward, key):
        reward, counted = place((reward, np.repeat(weights, config.group) > 0))
        advantage, weights, spread = compared(reward, rows, counted)
        rollout = grpo.Batch(
            rows.tokens,
            rows.segments,
            rows.mask,
            advantage,
            # by the trainer's arithmetic, not the sampler's; a rollout's only update needs none: its ratio is 1
            old_logp=actors.old_logp(config, rows, None if updates == 1 else partial(logp, policy, rows)),
            ref_logp=None if config.kl == "none" else logp(reference, rows),
            weights=weights,
            rollout_logp=None if config.correction == "none" else rows.logp,
        )
        parts, rollout = [], in_bundles(rollout, together)
        for part in rollouts.passes(key, rollout, epochs=config.epochs, minibatches=config.minibatches):
            state, metrics = update(state, place(part), trained.frozen(), trained.hyper(hyper, state))
            parts.append(metrics)
        return state, rollouts.mean_of(parts) | spread

    return learn


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    summands = [rollouts.rule(config.reward, 1.0)]
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    check_counts(config, mesh)
    hyperparameters(config)
    loaded = common.load_policy(config.model, mesh=mesh, compute_dtype=jnp.bfloat16 if config.bfloat16 else None)
    trained = adapters.arrange(config, loaded)
    prompts = rollouts.load_prompts(config, loaded)
    updates = config.steps * config.epochs * config.minibatches
    schedule = {"steps": updates, "warmup": config.warmup, "schedule": config.schedule}
    optimizer = common.make_optimizer(config.learning_rate, max_grad_norm=config.max_grad_norm, **schedule)
    state = common.create_state(trained.initial(loaded.params), optimizer, mesh, models.RULES, seed=config.seed)
    reference, follow, sampler = loaded.params, jax.jit(train.ema), rollouts.make_sampler(config, loaded)
    learn = make_learn(config, loaded.model, optimizer, trained, prompts, mesh)
    questions = prompts.questions(sharding.row_devices(mesh))
    evaluate = rollouts.make_evaluate(config, loaded, sampler, summands, questions, mesh)
    record = rollouts.make_record(config, loaded, sampler)
    stage = actors.make_stage(config, sampler, trained, state.params, prompts, mesh)
    draw = actors.make_draw(config, sampler, stage, mesh)
    position, queue = data.batching.Position(), ahead.Queue()

    def everything() -> dict[str, Any]:
        moving = {"reference": reference} if config.ema_rate else {}  # else it is the model as it was loaded
        under_way = actors.pack(stage, queue, actors.depth(config))
        return {"state": state, "position": position, "rollouts": under_way, **moving}

    with run:
        saved = run.resume(everything(), unsaved={"model": loaded.params, "prompts": prompts[:2]})
        state, position, reference = saved["state"], saved["position"], saved.get("reference", reference)
        result, completions = evaluate(trained.whole(state.params))
        if run.step == 0:
            common.print_samples("before", questions["prompts"][:4], completions[:4])
            run.log(0, result)
        stream = prompts.batches(prompts.train, batch_size=config.prompts, seed=config.seed, start=position)
        queue = actors.unpack(saved["rollouts"], stream)
        for step in range(run.step + 1, config.steps + 1):
            _, order_key = jax.random.split(jax.random.fold_in(state.key, step))
            queue, (asked, position, rows), age = draw(queue, step - 1, state.params, stream)
            policy = trained.whole(state.params)
            verdict = rollouts.judge(summands, loaded, asked, rows, config.group)
            measured = record(step, policy, asked, rows, verdict)
            state, metrics = learn(state, reference, policy, asked["weights"], rows, verdict.reward, order_key)
            if config.ema_rate > 0:
                reference = follow(reference, state.params, rate=config.ema_rate)
            metrics |= measured | age
            if step % config.evaluate_every == 0 or step == config.steps:
                result, completions = evaluate(trained.whole(state.params))
                metrics |= result
            run.log(
                step, metrics, partial(suspects.of_rollout, asked, rows, verdict, sampler, state.params, trained.whole)
            )
            run.save(step, everything())
        common.print_samples("after", questions["prompts"][:4], completions[:4])
        trained.save(config.output, loaded, state.params, config.model)
        result = run.finish(result)
    before, after = run.history["held_out/reward"][0][1], result["held_out/reward"]
    print(f"held-out reward {before:.3f} -> {after:.3f} at KL {result['held_out/kl']:.2f}; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
