"""Proximal policy optimisation with a critic: a rollout becomes a batch, from which policy and critic learn.

    rewards -> `experience` -> several epochs of minibatches -> one update of the policy and one of the critic each

The critic is a model of its own (`make_loss` beside `make_value_loss`, with an optimizer each) or a second head of the
policy (`make_shared_loss`). The KL to the reference is part of the reward. See "Proximal Policy Optimization
Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), "Fine-Tuning Language Models from Human Preferences",
Ziegler et al. (https://arxiv.org/abs/1909.08593), and, for what makes it work, "Is DPO Superior to PPO for LLM
Alignment? A Comprehensive Study", Xu et al. (https://arxiv.org/abs/2404.10719).

Recipes:
  PPO, clipped: `losses.ppo_clip`, `losses.value_clip`, `advantages.gae`, `reduce.whiten` (https://arxiv.org/abs/1707.06347).
  PPO, penalised: `losses.ppo_penalty`, its weight by `controllers.ppo_paper_kl` (https://arxiv.org/abs/1707.06347).
  PPO, both: `losses.ppo_hybrid` (https://arxiv.org/abs/1707.06347).
  RLHF: the KL in the reward by `rewards.shaped_rewards`, its weight by `controllers.adaptive_kl` (https://arxiv.org/abs/1909.08593).
  A2C: `algorithms.ppo.make_shared_loss`, policy_loss `losses.reinforce`, one update a rollout (https://arxiv.org/abs/1602.01783).
  TRPO: `trpo.make_trpo` for the policy, `losses.value_clip` for the critic (https://arxiv.org/abs/1502.05477).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce, rewards
from alignax.advantages import gae
from alignax.algorithms._fillers import blank
from alignax.algorithms._policy import policy_metrics
from alignax.logprobs import Scores, score, token_values
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Sampled rows with what is constant about them while they are learned from."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], tokens the policy chose
    old_logp: Array  # float32 [B, T], of the policy that sampled, by the trainer
    old_values: Array  # float32 [B, T], of the critic before it learned from these rows
    advantages: Array  # float32 [B, T]
    returns: Array  # float32 [B, T], what the critic should have said
    weights: Array | None = None  # float32 [B]; a filler row weighs 0


def experience(
    rows: Any,
    scores: Array,
    *,
    logp: Array,
    ref_logp: Array,
    values: Array,
    bootstrap: Array | None = None,
    kl_coef: Scalar = 0.05,
    kl: Callable[..., Array] = losses.k1,
    gamma: Scalar = 1.0,
    lambda_: Scalar = 0.95,
    normalise: Callable[[Array, Array], Array] | None = reduce.whiten,
    weights: Array | None = None,
) -> tuple[Batch, dict[str, Array]]:
    """A whole rollout as a batch, and what it was like. Compile it over the global arrays, before they are split.

    Each token is rewarded with -kl_coef * kl, the last one of a row with its score as well; GAE gives advantages and
    returns, and the advantages are normalised over all tokens of the rollout once.

    Args:
      rows: `tokens`, `segments` and `mask` `[B, T]` by attribute, as in `alignax.sampling.Samples`.
      scores: `[B]`, of finished rows; see `alignax.rewards` for what may be done to them first. A row that could not
        be scored (NaN) is left out.
      logp, ref_logp: `[B, T]`, log-probabilities of the tokens under policy and reference at the sampler's temperature.
      values: `[B, T]`, from `alignax.logprobs.token_values`.
      bootstrap: `[B]`, the value of the state after rows that were cut off and would have gone on, else 0
        (`alignax.logprobs.last_score`); None: a row that was cut off has ended.
      kl_coef: the weight of the KL in the reward (beta).
      kl: its estimator. k1 is the one whose policy gradient is that of KL(policy || reference).
      gamma, lambda_: of `alignax.advantages.gae`.
      normalise: (advantages, mask) -> advantages; None leaves them as they are.
      weights: `[B]`, 0 for filler rows, which then enter no statistic.

    Returns:
      The batch, and scalars: `objective/kl` (k1), `objective/entropy` (minus the log-probability), `objective/scores`,
      `objective/non_score_reward` and `objective/rlhf_reward`, sums over a row averaged over the rows that have
      tokens; `returns/mean`, `returns/std`, `values/mean` and `values/explained_variance` over tokens.
    """
    chex.assert_equal_shape([rows.tokens, rows.mask, logp, ref_logp, values])
    counted = jnp.ones(scores.shape) if weights is None else weights
    chex.assert_shape([scores, counted], rows.tokens.shape[:1])
    counted = jnp.where(jnp.isnan(scores), 0.0, counted)
    mask = (rows.mask != 0) & (counted != 0)[:, None]
    counted = jnp.where(jnp.any(mask, axis=1), counted, 0.0)  # a row without tokens is paid nothing
    shaped = rewards.shaped_rewards(scores, logp, ref_logp, mask, kl_coef=kl_coef, kl=kl)
    advantages, returns = gae(shaped, values, mask, gamma=gamma, lambda_=lambda_, bootstrap=bootstrap)
    sums = {
        "objective/kl": losses.k1(logp, ref_logp, mask),
        "objective/entropy": -logp,
        "objective/non_score_reward": -kl_coef * kl(logp, ref_logp, mask),
    }
    metrics = {name: reduce.sequence_sum(x, mask, weights).value() for name, x in sums.items()}
    metrics["objective/scores"] = reduce.batch_mean(scores, counted).value()
    metrics["objective/rlhf_reward"] = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    metrics |= _value_metrics(values, returns, mask)
    if normalise is not None:
        advantages = normalise(advantages, mask)
    batch = Batch(rows.tokens, rows.segments, mask, logp, values, advantages, returns, weights)
    return jax.lax.stop_gradient((batch, metrics))


def make_loss(
    model: Model,
    *,
    policy_loss: Callable[..., Array] = losses.ppo_clip,
    entropy_weight: Scalar | None = None,
    temperature: Scalar = 1.0,
    mean: Callable[..., Mean] = reduce.token_mean,
) -> LossFn:
    """Makes the policy's loss function mean(policy_loss) - entropy_weight * mean(entropy).

    Args:
      model: the policy.
      policy_loss: any `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`.
      entropy_weight: of the entropy bonus (paper: c2); None: there is none, and its gradient costs nothing.
      temperature: the sampler's, at which log-probabilities are taken.
      mean: a reduction of `alignax.reduce`, for both terms.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; nothing frozen is needed; `hyper` may
      override `entropy_weight` and `temperature` and holds the policy loss's own hyperparameters. Metrics: `entropy`,
      `ratio`, `ratio/max`, `approx_kl` (k3 between old and new policy, per token) and `clip_fraction` (tokens whose
      gradient the policy loss took away).
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        hyper = {"entropy_weight": entropy_weight, "temperature": temperature} | hyper
        batch = blank(batch)
        scores = _scored(model, params, batch, hyper.pop("temperature"), ("entropy",))
        return _policy_terms(scores, batch, policy_loss, mean, hyper)

    return loss_fn


def make_value_loss(
    critic: Model,
    *,
    value_loss: Callable[..., Array] = losses.value_clip,
    mean: Callable[..., Mean] = reduce.token_mean,
) -> LossFn:
    """Makes the critic's loss function mean(value_loss).

    Args:
      critic: a model with a scalar head, see `alignax.models.with_score`.
      value_loss: any `loss(values, old_values, returns, mask, *, ...) -> [B, T]`.
      mean: a reduction of `alignax.reduce`.

    Returns:
      `loss_fn(params, batch, frozen, hyper)`; `hyper` holds the value loss's own hyperparameters. Metrics: `values` and
      `values/clip_fraction` (tokens whose gradient the value loss took away).
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        batch = blank(batch)
        values = token_values(critic, params, batch.tokens, batch.segments, mask=batch.mask)
        return _value_terms(values, batch, value_loss, mean, 1.0, hyper)

    return loss_fn


def make_shared_loss(
    model: Model,
    *,
    policy_loss: Callable[..., Array] = losses.ppo_clip,
    value_loss: Callable[..., Array] = losses.value_clip,
    value_weight: Scalar = 0.1,
    entropy_weight: Scalar | None = None,
    temperature: Scalar = 1.0,
    mean: Callable[..., Mean] = reduce.token_mean,
) -> LossFn:
    """Makes the loss function of a policy that is its own critic: `make_loss` + value_weight * `make_value_loss`.

    Args:
      model: `alignax.models.with_score(policy)`, its parameters from `add_score(..., keep_head=True)`.
      value_weight: of the value loss (paper: c1).
      policy_loss, value_loss, entropy_weight, temperature, mean: as for `make_loss` and `make_value_loss`.

    Returns:
      `loss_fn(params, batch, frozen, hyper)`; one forward pass gives both. In `hyper`, the value loss's own
      hyperparameters are called `value_NAME`: `value_clip` for the `clip` of `losses.value_clip`.
    """
    defaults = {"value_weight": value_weight, "entropy_weight": entropy_weight, "temperature": temperature}

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        hyper = defaults | hyper
        weight = hyper.pop("value_weight")
        prefix = "value_"
        value_hyper = {name.removeprefix(prefix): hyper.pop(name) for name in [*hyper] if name.startswith(prefix)}
        batch = blank(batch)
        scores = _scored(model, params, batch, hyper.pop("temperature"), ("entropy", "values"))
        policy, policy_report = _policy_terms(scores, batch, policy_loss, mean, hyper)
        value, value_report = _value_terms(scores.values, batch, value_loss, mean, weight, value_hyper)
        return policy | value, policy_report | value_report

    return loss_fn


def _scored(model: Model, params: Params, batch: Batch, temperature: Scalar, want: tuple[str, ...]) -> Scores:
    rows = (batch.tokens, batch.segments)
    return score(model, params, *rows, mask=batch.mask, temperature=temperature, want=want)


def _policy_terms(scores: Scores, batch: Batch, policy_loss: Callable, mean: Callable, hyper: dict):
    bonus = hyper.pop("entropy_weight")
    arguments = (scores.logp, batch.old_logp, batch.advantages, batch.mask)
    terms = {"policy": Term(1.0, mean(policy_loss(*arguments, **hyper), batch.mask, batch.weights))}
    if bonus is not None:
        terms["entropy"] = Term(-bonus, mean(scores.entropy, batch.mask, batch.weights))
    metrics = policy_metrics(policy_loss, *arguments, batch.weights, hyper)
    metrics["entropy"] = reduce.token_mean(scores.entropy, batch.mask, batch.weights)
    return terms, jax.lax.stop_gradient(metrics)


def _value_terms(values: Array, batch: Batch, value_loss: Callable, mean: Callable, weight: Scalar, hyper: dict):
    def per_token(values):
        return value_loss(values, batch.old_values, batch.returns, batch.mask, **hyper)

    per, pull = jax.vjp(per_token, jax.lax.stop_gradient(values))
    clipped = (pull(jnp.ones_like(per))[0] == 0) & (per != 0)
    metrics = {
        "values": reduce.token_mean(jax.lax.stop_gradient(values), batch.mask, batch.weights),
        "values/clip_fraction": reduce.token_mean(clipped.astype(jnp.float32), batch.mask, batch.weights),
    }
    return {"value": Term(weight, mean(per_token(values), batch.mask, batch.weights))}, metrics


def _value_metrics(values: Array, returns: Array, mask: Array) -> dict[str, Array]:
    return {
        "returns/mean": reduce.token_mean(returns, mask).value(),
        "returns/std": jnp.sqrt(reduce.variance(returns, mask, ddof=0)),
        "values/mean": reduce.token_mean(values, mask).value(),
        "values/explained_variance": reduce.explained_variance(values, returns, mask),
    }
