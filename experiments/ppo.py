"""Proximal policy optimisation: a Hugging Face folder, a file of prompts and a reward in, the aligned folder out.

    python experiments/ppo.py --model FOLDER --data prompts.jsonl --reward-model runs/reward/model --output runs/ppo

The reward is a learned model (a folder of reward_model.py, or any ...ForSequenceClassification of one label with the
policy's vocabulary), a rule as in grpo.py, or the sum of both with weights. The critic begins as the reward model, as
the policy with a new scalar head, or is a second head of the policy. The reference is the model as it was loaded, or an
average that follows the policy. Results in the output folder: model/ (a Hugging Face folder), critic/ (unless the
policy is its own), metrics.jsonl, TensorBoard scalars, curves.png, config.json.

Any policy loss will do. Controllers, each off unless it has a target, move the weight of the KL in the reward
(`--kl-target`), that of the penalty of ppo_penalty and ppo_hybrid, as PPO's paper does (`--penalty-target`), and that
of the entropy bonus (`--entropy-target`).
"""

import dataclasses
import pathlib
from functools import partial
from typing import Annotated, Any, Literal

import actor_critic
import checks
import common
import experience
import jax
import jax.numpy as jnp
import launch
import policy_losses
import records
import rollouts
import running
import suspects
import tyro
from actor_critic import Learner, States
from experience import Kept
from policy_losses import POLICY_LOSSES, PolicyLoss

from alignax import data, sharding
from alignax.algorithms import ppo
from alignax.io import hf

MOVED = {
    "penalty_weight": "kl_weight",
    "entropy_weight": "entropy_weight",
}  # what controllers move, by the loss's names
SHOW = ("reward", "objective/kl", "length", "held_out/reward")
CURVES = ("reward", "held_out/reward", "held_out/kl", "objective/kl", "kl_coef", "length", "entropy", "clip_fraction")
CURVES += ("approx_kl", "loss/value", "values/explained_variance", "truncated")


@dataclasses.dataclass(frozen=True)
class Config(rollouts.Options, running.Options):
    """Proximal policy optimisation."""

    model: str
    """Hugging Face folder, or id on the hub: the policy, and the first reference."""
    data: str
    """JSONL, JSON or Parquet file of prompts, a folder of these, or an id of the hub."""
    output: pathlib.Path
    """New folder for everything that comes out."""
    reward_model: str = ""
    """Folder of a reward model that reads the policy's tokens; empty for none."""
    reward_model_weight: float = 1.0
    """Its weight in the reward."""
    reward: str = ""
    """A rule: last_number (the answer's, as in GSM8K), or FILE.py:FUNCTION; empty for none."""
    reward_weight: float = 1.0
    """Its weight in the reward."""
    critic: Literal["reward_model", "policy", "shared"] = "reward_model"
    """What the critic begins as: the reward model, the policy with a new head; or it shares the policy's body."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Columns of the data to rename, old name and new name."""
    steps: int = 100
    """Rollouts."""
    prompts: int = 64
    """Prompts of a rollout."""
    group: int = 1
    """Completions of each prompt."""
    epochs: int = 4
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
    missing_eos_penalty: float = 1.0
    """Taken off the score of a completion that was cut off."""
    bootstrap: bool = False
    """Count what the critic expects after a completion that was cut off; needs missing_eos_penalty 0."""
    reward_scaling: Literal["none", "start", "running"] = "none"
    """Scores as they are; shifted and scaled so that the first rollout has mean 0 and deviation 1; or divided by their
    running deviation."""
    reward_clip: float = 0.0
    """Largest size of a score after that; 0 for any."""
    kl: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of KL(policy || reference) in the reward; k1 is the unbiased one."""
    kl_coef: float = 0.05
    """Its weight, or the first one."""
    kl_target: float = 0.0
    """Adapt the weight towards this KL, in nats per completion; 0 keeps it."""
    kl_horizon: int = 10_000
    """Completions over which it adapts."""
    ema_rate: float = 0.0
    """How far the reference follows the policy after each rollout; 0 keeps it fixed."""
    gamma: float = 1.0
    """Discount."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.95
    """Of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Normalise the advantages over all tokens of a rollout."""
    value_normalisation: bool = False
    """The critic predicts returns in units of their running mean and deviation."""
    policy_loss: PolicyLoss = "ppo_clip"
    """What the policy minimises: see `alignax.losses`, policy_gradient.py and sequence_policy.py."""
    clip_low: float | None = None
    """How far below 1 a ratio counts; None: as the policy loss was published."""
    clip_high: float | None = None
    """How far above 1 a ratio counts; None: as the policy loss was published."""
    hyper: dict[str, float] = dataclasses.field(default_factory=dict)
    """Other hyperparameters of the policy loss, name and value, such as `dual_clip 3`."""
    penalty_weight: float | None = None
    """Of the KL to the policy that sampled, for ppo_penalty and ppo_hybrid, or the first one; None: 1."""
    penalty_target: float = 0.0
    """Halve or double that weight to keep this KL per token after the updates of a rollout; 0 keeps the weight."""
    value_clip: float = 0.2
    """How far a value may move from the rollout's and still count; 0 does not clip."""
    value_weight: float = 0.1
    """Of the value loss where critic is shared."""
    entropy_weight: float = 0.0
    """Of the entropy bonus, or the first one."""
    entropy_target: float = 0.0
    """Raise that weight while a rollout's entropy per token is at most this, else lower it and leave the bonus out; 0
    keeps the weight."""
    entropy_step: float = 0.005
    """By how much, after each rollout."""
    target_kl: float = 0.0
    """End the passes over a rollout, the critic's too, once the KL between old and new policy, per token and before an
    update, is above 1.5 times this; 0 does not look."""
    critic_warmup: int = 0
    """First rollouts from which only the critic learns."""
    held_out: float = 0.1
    """Fraction of the prompts that is evaluated on and never trained on."""
    evaluate_every: int = 25
    """Rollouts between two evaluations."""
    evaluate_prompts: int = 64
    """Most held-out prompts of an evaluation, one completion of each."""
    learning_rate: float = 1e-6
    """Peak learning rate of the policy's AdamW."""
    critic_learning_rate: float = 1e-5
    """The same of the critic's, where it is a network of its own."""
    warmup: int = 5
    """Updates over which the learning rates rise; schedules count all updates there may be."""
    schedule: common.Schedule = "constant"
    """How they fall afterwards."""
    max_grad_norm: float = 1.0
    """Global norm to which gradients are clipped; 0 clips nothing."""
    bfloat16: bool = False
    """Compute in bfloat16; parameters, losses and optimizer stay float32."""
    seed: int = 0
    """Of new heads, the data order and sampling."""


def check(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses at once what would fail after a rollout, or quietly do something else."""
    checks.check(config, mesh, rows=config.prompts, parts=1)
    if not config.reward_model and not config.reward:
        raise ValueError("no reward: give --reward-model FOLDER, --reward RULE, or both")
    if config.critic == "reward_model" and not config.reward_model:
        raise ValueError("--critic reward_model needs --reward-model; without one choose policy or shared")
    if config.bootstrap and config.missing_eos_penalty:
        raise ValueError(
            f"bootstrap=True with missing_eos_penalty={config.missing_eos_penalty}: a completion that was cut off "
            "either goes on or is punished; set the penalty to 0"
        )
    if config.critic == "shared" and config.critic_warmup:
        raise ValueError("--critic shared has no critic_warmup: its body is the policy's; choose policy")
    if config.kl_target and not config.kl_coef:
        raise ValueError("kl_target needs a kl_coef above 0, which it multiplies")
    if config.penalty_target and not config.penalty_weight:
        raise ValueError("penalty_target needs a penalty_weight above 0, which it multiplies")
    if config.penalty_weight is not None and "kl_weight" not in checks.keywords(POLICY_LOSSES[config.policy_loss]):
        raise ValueError(f"penalty_weight: {config.policy_loss} has no penalty; expected ppo_penalty or ppo_hybrid")
    policy_losses.check(config.policy_loss, config.epochs, config.minibatches)
    rollouts.check_options(config)
    if (config.target_kl or config.penalty_weight is not None) and config.epochs * config.minibatches == 1:
        raise ValueError(
            "target_kl and penalty_weight look at what the first update did; a rollout has only one update"
        )
    at_least_one = ("group", "epochs", "minibatches", "evaluate_prompts", "max_new_tokens", "kl_horizon")
    at_least_zero = ("kl_coef", "kl_target", "value_clip", "reward_clip", "target_kl", "critic_warmup", "value_weight")
    at_least_zero += ("clip_low", "clip_high", "gamma", "lambda_", "ema_rate", "missing_eos_penalty")
    at_least_zero += ("entropy_weight", "entropy_target", "penalty_weight", "penalty_target")
    at_most_one = ("clip_low", "gamma", "lambda_", "ema_rate")
    most = dict.fromkeys(at_most_one, 1) | {"critic_warmup": config.steps - 1}
    most |= {"entropy_weight": 1} if config.entropy_target else {}  # where the controller ends
    checks.check_ranges(config, least=dict.fromkeys(at_least_one, 1) | dict.fromkeys(at_least_zero, 0), most=most)
    for name in ("critic_learning_rate", "temperature", "entropy_step"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}={getattr(config, name)}; expected a number above 0")
    actor_critic.hyperparameters(config)
    checks.check(config, mesh, rows=config.prompts * config.group, parts=config.minibatches * config.microbatches)


def save(config: Config, loaded: hf.Loaded, learner: Learner, states: States, kept: Kept) -> None:
    """model/, and critic/ where it is a network of its own; value_norm.json says in which units the critic speaks."""
    networks = {
        "model": (loaded.model, learner.policy(states)),
        "critic": (learner.critic_model, learner.critic(states)),
    }
    for name, network in networks.items():
        if name == "model" or config.critic != "shared":
            hf.save(records.cleared(config.output / name), *network, loaded.tokenizer)
    if config.value_normalisation:
        units = {"mean": float(kept.values.mean), "variance": float(kept.values.variance)}
        records.everywhere(lambda: records.write(config.output / "value_norm.json", units))


def learn_from(
    config: Config, learner: Learner, states: States, batch: ppo.Batch, said: dict, key: jax.Array, critic_only: bool
) -> tuple[States, dict[str, jax.Array]]:
    """Several passes over a rollout, each in a new order; ends early once the policy has moved too far."""
    moved = {own: said[name] for name, own in MOVED.items() if name in said}
    parts = []
    for part in rollouts.passes(key, batch, epochs=config.epochs, minibatches=config.minibatches):
        states, metrics = learner.learn(states, part, moved, critic_only)
        parts.append(metrics)
        if config.target_kl and not critic_only and float(metrics["approx_kl"]) > 1.5 * config.target_kl:
            break
    return states, rollouts.mean_of(parts)


def load(config: Config, mesh: jax.sharding.Mesh) -> tuple[hf.Loaded, hf.Loaded | None, list[rollouts.Part]]:
    """The policy, the reward model if there is one, and the summands of the reward."""
    options = {"mesh": mesh, "compute_dtype": jnp.bfloat16 if config.bfloat16 else None}
    loaded, reward, summands = common.load_policy(config.model, **options), None, []
    if config.reward_model:
        size, weight = rollouts.rows_at_once(config), config.reward_model_weight
        reward, part = rollouts.learned(config.reward_model, weight, loaded.tokenizer, size=size, **options)
        summands = [part]
    if config.reward:
        summands.append(rollouts.rule(config.reward, config.reward_weight))
    return loaded, reward, summands


@launch.on_mesh
def main(config: Config, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Runs the experiment and returns the last evaluation."""
    run = running.Run(config, total=config.steps, show=SHOW, curves=CURVES)
    if run.result is not None:
        return run.result
    check(config, mesh)
    loaded, reward, summands = load(config, mesh)
    prompts = rollouts.load_prompts(config, loaded, *([reward] if reward else []))
    sampler, learner = rollouts.make_sampler(config, loaded), actor_critic.make_learner(config, loaded, reward, mesh)
    collect, adapt = experience.make_collect(config, sampler, learner), experience.make_adapt(config, sampler)
    kept = experience.start(config, loaded.params, mesh)
    states, key, position = learner.states, jax.random.key(config.seed), data.batching.Position(0, 0)
    questions = prompts.questions()
    evaluate = rollouts.make_evaluate(config, loaded, sampler, summands, questions)
    record = rollouts.make_record(config, loaded, sampler)

    def everything() -> dict[str, Any]:
        moved = kept if config.ema_rate else kept._replace(reference=None)  # else it is the model as it was loaded
        return {"states": states, "kept": moved, "position": position}

    with run:
        loaded_too = {"model": loaded.params, "reward_model": reward and reward.params, "prompts": prompts[:2]}
        found = run.resume(everything(), unsaved=loaded_too)
        states, position = found["states"], found["position"]
        kept = found["kept"] if config.ema_rate else found["kept"]._replace(reference=kept.reference)
        result, completions = evaluate(learner.policy(states))
        if run.step == 0:
            common.print_samples("before", questions["prompts"][:4], completions[:4])
            run.log(0, result)
        stream = prompts.batches(prompts.train, batch_size=config.prompts, seed=config.seed, start=position)
        for step in range(run.step + 1, config.steps + 1):
            sample_key, order_key = jax.random.split(jax.random.fold_in(key, step))
            asked, position = next(stream)
            placed = sharding.shard_batch((asked["tokens"], asked["lengths"]), mesh)
            rows = sampler.sample(learner.policy(states), *placed, sample_key)
            verdict = rollouts.judge(summands, loaded, asked, rows, config.group)
            measured = record(step, learner.policy(states), asked, rows, verdict)
            weights = jnp.repeat(jnp.asarray(asked["weights"]), config.group)  # 0 where rows fill an epoch's last batch
            batch, said, kept = collect(states, kept, rows, jnp.asarray(verdict.reward), weights)
            only = step <= config.critic_warmup
            states, metrics = learn_from(config, learner, states, batch, said, order_key, only)
            metrics |= said | measured
            if not only:
                kept, seen = adapt(kept, learner.policy(states), rows, batch, said)
                metrics |= seen
            if step % config.evaluate_every == 0 or step == config.steps:
                result, completions = evaluate(learner.policy(states))
                metrics |= result
            run.log(step, metrics, partial(suspects.of_rollout, asked, rows, verdict, sampler, states, learner.policy))
            run.save(step, everything())
        common.print_samples("after", questions["prompts"][:4], completions[:4])
        save(config, loaded, learner, states, kept)
        result = run.finish(result)
    before, after = run.history["held_out/reward"][0][1], result["held_out/reward"]
    print(f"held-out reward {before:.3f} -> {after:.3f} at KL {result['held_out/kl']:.2f}; {config.output}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
