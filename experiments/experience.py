"""From judged rollouts to PPO's batches: scores, values and KL, and what is kept and moved between rollouts."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import rollouts
from actor_critic import Learner
from jax.sharding import NamedSharding, PartitionSpec

from alignax import controllers, losses, moments, reduce, rewards, sampling, train
from alignax.algorithms import ppo
from alignax.types import Params

KLS = {"k1": losses.k1, "k2": losses.k2, "k3": losses.k3}


def make_scale(config: Any) -> Callable[..., tuple[jax.Array, moments.Moments]]:
    """Makes `scale(seen, scores, finished, weights) -> (scores, seen)`: what is done to scores before shaping."""

    def scale(seen, scores, finished, weights):
        scores = rewards.subtract_missing_eos(scores, finished, penalty=config.missing_eos_penalty)
        first = seen.count == 0
        met = moments.update_moments(seen, scores, weights)
        if config.reward_scaling == "start":
            met = jax.tree.map(lambda new, old: jnp.where(first, new, old), met, seen)
            scores = (scores - met.mean) / jnp.maximum(met.std(), 1e-4)
        if config.reward_scaling == "running":
            scores = scores / jnp.maximum(met.std(), 1e-4)
        if config.reward_clip:
            scores = jnp.clip(scores, -config.reward_clip, config.reward_clip)
        return scores, met

    return jax.jit(scale)


class Kept(NamedTuple):
    """What PPO keeps between rollouts beside its networks."""

    reference: Params
    kl_coef: jax.Array
    penalty: jax.Array  # the weight of the policy loss's KL
    bonus: jax.Array  # the weight of the entropy, wherever it counts
    scores: moments.Moments
    values: moments.ValueNorm


def start(config: Any, reference: Params, mesh: jax.sharding.Mesh) -> Kept:
    """What is kept before the first rollout; its numbers lie where later ones will, so that these recompile nothing."""
    weights = (config.kl_coef, config.penalty_weight or 0.0, config.entropy_weight)
    numbers = (*map(jnp.float32, weights), moments.Moments.init(), moments.ValueNorm.init())
    return Kept(reference, *jax.device_put(numbers, NamedSharding(mesh, PartitionSpec())))


def make_collect(config: Any, sampler: rollouts.Sampler, learner: Learner) -> Callable[..., tuple]:
    """Makes `collect(states, kept, rows, scores, weights) -> (batch, metrics, kept)`: a judged rollout as a batch."""
    scale, options = make_scale(config), {"kl": KLS[config.kl], "gamma": config.gamma, "lambda_": config.lambda_}
    options["normalise"] = reduce.whiten if config.whiten_advantages else None
    experience = jax.jit(partial(ppo.experience, **options))

    def collect(states, kept: Kept, rows: sampling.Samples, scores, weights):
        scores, seen = scale(kept.scores, scores, ~rows.truncated, weights)
        # by the trainer's arithmetic, not the sampler's: the ratio of the first update is 1
        logp, ref_logp = sampler.logp(learner.policy(states), rows), sampler.logp(kept.reference, rows)
        critic = learner.critic(states)
        raw = values = learner.values(critic, rows)
        after = jnp.where(rows.truncated, learner.last_values(critic, rows), 0.0) if config.bootstrap else None
        norm = kept.values
        if config.value_normalisation:
            values = moments.denormalise(norm, raw)
            after = None if after is None else jnp.where(rows.truncated, moments.denormalise(norm, after), 0.0)
        batch, metrics = experience(
            rows,
            scores,
            logp=logp,
            ref_logp=ref_logp,
            values=values,
            bootstrap=after,
            kl_coef=kept.kl_coef,
            weights=weights,
        )
        if config.value_normalisation:
            norm = moments.value_norm_update(norm, batch.returns, batch.mask)
            batch = batch._replace(old_values=raw, returns=moments.normalise(norm, batch.returns))
        metrics["kl_coef"] = kept.kl_coef
        if config.penalty_target:
            metrics["penalty_weight"] = kept.penalty
        if config.entropy_target:  # the bonus counts only where there is too little entropy
            metrics["entropy/before"] = entropy = reduce.token_mean(-batch.old_logp, batch.mask).value()
            metrics["entropy_weight"] = kept.bonus * (entropy <= config.entropy_target)
        return batch, metrics, kept._replace(scores=seen, values=norm)

    return collect


def make_adapt(config: Any, sampler: rollouts.Sampler) -> Callable[..., tuple[Kept, dict[str, jax.Array]]]:
    """Makes `adapt(kept, policy, rows, batch, said) -> (kept, metrics)`: what follows a policy that has learned."""
    follow = jax.jit(train.ema)

    def adapt(kept: Kept, policy: Params, rows: sampling.Samples, batch: ppo.Batch, said: dict[str, jax.Array]):
        metrics = {}
        if config.kl_target:
            options = {"horizon": config.kl_horizon, "count": jnp.sum(jnp.any(batch.mask, axis=1))}
            kl_coef = controllers.adaptive_kl(kept.kl_coef, said["objective/kl"], target=config.kl_target, **options)
            kept = kept._replace(kl_coef=kl_coef)
        if config.penalty_target:
            moved = losses.k3(batch.old_logp, sampler.logp(policy, rows), batch.mask)  # of samples of the old policy
            kl = metrics["approx_kl/after"] = reduce.token_mean(moved, batch.mask).value()
            kept = kept._replace(penalty=controllers.ppo_paper_kl(kept.penalty, kl, target=config.penalty_target))
        if config.entropy_target:
            options = {"target": config.entropy_target, "step": config.entropy_step}
            kept = kept._replace(bonus=controllers.adaptive_entropy(kept.bonus, said["entropy/before"], **options))
        if config.ema_rate:
            kept = kept._replace(reference=follow(kept.reference, policy, rate=config.ema_rate))
        return kept, metrics

    return adapt
