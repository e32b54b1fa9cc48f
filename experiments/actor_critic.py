"""The two ways for PPO to have a critic, behind one face: a network of its own, or a second head of the policy."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import common
import jax
import policy_losses
import rollouts

from alignax import losses, models, sharding, train
from alignax.algorithms import ppo
from alignax.io import hf
from alignax.logprobs import last_score, token_values
from alignax.types import Array, Model, Params

States = dict[str, train.TrainState]


class Learner(NamedTuple):
    """Policy and critic: the states to begin with, and what is done with states.

    `learn` takes the policy loss's hyperparameters that were moved since, and whether the critic learns alone.
    """

    states: States
    learn: Callable[..., tuple[States, dict[str, Array]]]  # (states, minibatch, moved, critic_only) -> states, metrics
    policy: Callable[[States], Params]
    critic: Callable[[States], Params]  # what `values` and `last_values` take
    values: Callable  # (critic, samples) -> values [R, T] of the states before each token
    last_values: Callable  # (critic, samples) -> values [R] of the states after each row
    critic_model: Model


def make_learner(config: Any, loaded: hf.Loaded, reward: hf.Loaded | None, mesh: jax.sharding.Mesh) -> Learner:
    """Policy and critic, the critic as the configuration wants it to begin."""
    if config.critic == "shared":
        return shared(config, loaded, mesh)
    if config.critic == "reward_model" and reward is not None:
        return separate(config, loaded, reward.model, reward.params, mesh)
    params = models.add_score(loaded.model, loaded.params, jax.random.key(config.seed))
    return separate(config, loaded, models.with_score(loaded.model), params, mesh)


def separate(config: Any, policy: hf.Loaded, critic: Model, critic_params: Params, mesh: jax.sharding.Mesh) -> Learner:
    """A critic that is a network of its own, with an optimizer and a learning rate of its own."""
    optimizer = make_optimizer(config, config.learning_rate)
    critic_optimizer = make_optimizer(config, config.critic_learning_rate)
    policy_loss = policy_losses.POLICY_LOSSES[config.policy_loss]
    update = compile_update(config, ppo.make_loss(policy.model, policy_loss=policy_loss), optimizer)
    critic_loss = ppo.make_value_loss(critic, value_loss=value_loss(config))
    update_critic = compile_update(config, critic_loss, critic_optimizer)
    hyper, value_hyper = hyperparameters(config)
    create = partial(common.create_state, mesh=mesh, rules=models.RULES, seed=config.seed)

    def learn(states: States, part: ppo.Batch, moved: dict[str, Array], critic_only: bool = False):
        part = sharding.shard_batch(part, mesh)
        critic_state, found = update_critic(states["critic"], part, None, value_hyper)
        metrics = {name if "value" in name else f"critic/{name}": value for name, value in found.items()}
        state = states["policy"]
        if not critic_only:
            state, found = update(state, part, None, hyper | moved)
            metrics |= found
        return {"policy": state, "critic": critic_state}, metrics

    states = {"policy": create(policy.params, optimizer), "critic": create(critic_params, critic_optimizer)}
    return Learner(
        states, learn, lambda s: s["policy"].params, lambda s: s["critic"].params, *readers(config, critic), critic
    )


def shared(config: Any, policy: hf.Loaded, mesh: jax.sharding.Mesh) -> Learner:
    """A policy that is its own critic: one body, one optimizer, one update for both."""
    model = models.with_score(policy.model)
    optimizer = make_optimizer(config, config.learning_rate)
    options = {"policy_loss": policy_losses.POLICY_LOSSES[config.policy_loss], "value_loss": value_loss(config)}
    loss_fn = ppo.make_shared_loss(model, **options, value_weight=config.value_weight)
    update = compile_update(config, loss_fn, optimizer)
    hyper, value_hyper = hyperparameters(config)
    hyper |= {f"value_{name}": value for name, value in value_hyper.items()}

    def learn(states: States, part: ppo.Batch, moved: dict[str, Array], critic_only: bool = False):
        if critic_only:
            raise ValueError("a shared critic cannot learn alone: its body is the policy's")
        part = sharding.shard_batch(part, mesh)
        state, metrics = update(states["shared"], part, None, hyper | moved)
        return {"shared": state}, metrics

    params = models.add_score(policy.model, policy.params, keep_head=True)
    states = {"shared": common.create_state(params, optimizer, mesh, models.RULES, seed=config.seed)}
    return Learner(
        states,
        learn,
        lambda s: s["shared"].params["backbone"],
        lambda s: s["shared"].params,
        *readers(config, model),
        model,
    )


def make_optimizer(config: Any, learning_rate: float) -> Any:
    """AdamW over all updates of the run; its eps is the 1e-5 of PPO's practice."""
    updates = config.steps * config.epochs * config.minibatches
    schedule = {"steps": updates, "warmup": config.warmup, "schedule": config.schedule}
    return common.make_optimizer(learning_rate, **schedule, max_grad_norm=config.max_grad_norm, eps=1e-5)


def compile_update(config: Any, loss_fn: Callable, optimizer: Any) -> Callable:
    """The update of one network; the state it is given is donated."""
    return sharding.in_place(train.make_update(loss_fn, optimizer, microbatches=config.microbatches))


def value_loss(config: Any) -> Callable[..., Array]:
    """Clipped around the rollout's values, or not."""
    return losses.value_clip if config.value_clip else partial(losses.value_clip, clip=None)


def hyperparameters(config: Any) -> tuple[dict, dict]:
    """What the policy's update and what the critic's is given to trace."""
    flags = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    if config.penalty_weight is not None:  # a loss without a penalty has no such number
        flags["kl_weight"] = config.penalty_weight
    policy = {"temperature": config.temperature}
    policy |= policy_losses.hyperparameters(config.policy_loss, config.hyper, **flags)
    policy |= {"entropy_weight": config.entropy_weight} if config.entropy_weight else {}
    return policy, {"clip": config.value_clip} if config.value_clip else {}


def readers(config: Any, critic: Model) -> tuple[Callable, Callable]:
    """`values` and `last_values` of a `Learner`."""

    def values(params, rows):
        return token_values(critic, params, rows.tokens, rows.segments, mask=rows.mask)

    def last_values(params, rows):
        return last_score(critic, params, rows.tokens, rows.segments)

    size = rollouts.rows_at_once(config)
    return jax.jit(train.in_parts(values, size)), jax.jit(train.in_parts(last_values, size))
