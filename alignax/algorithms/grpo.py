"""Group-relative policy optimisation: PPO's clipped objective, a group's mean reward in place of a critic.

See "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", Shao et al.
(https://arxiv.org/abs/2402.03300), eq. 3. Its relatives are other arguments: any advantage goes with any policy loss
and any reduction. `alignax.corrections` makes up for a sampler that is not quite the policy.

Recipes:
  GRPO: `advantages.group_relative`, `losses.ppo_clip`, `losses.k3`, `reduce.sequence_mean` (https://arxiv.org/abs/2402.03300).
  GRPO, process supervision: `advantages.group_relative_process` (https://arxiv.org/abs/2402.03300).
  Dr. GRPO: `advantages.group_centred`, `reduce.constant_mean`, no KL (https://arxiv.org/abs/2503.20783).
  DAPO: clip_high 0.28, `reduce.token_mean`, `advantages.informative_groups` as weights, `rewards.soft_overlong`, no KL (https://arxiv.org/abs/2503.14476).
  RLOO: `advantages.leave_one_out`, `losses.rloo`, the KL in the reward (https://arxiv.org/abs/2402.14740).
  ReMax: `advantages.remax`, `losses.reinforce`, `reduce.token_mean` (https://arxiv.org/abs/2310.10505).
  REINFORCE++: `advantages.reinforce_plus_plus`, `losses.ppo_clip`, `reduce.token_mean` (https://arxiv.org/abs/2501.03262).
  REINFORCE++ with a baseline: `advantages.reinforce_plus_plus_baseline`, `losses.ppo_clip` (https://arxiv.org/abs/2501.03262).
  OPO: `advantages.opo`, `losses.reinforce` (https://arxiv.org/abs/2505.23585).
  GDPO, several rewards: `advantages.multi_reward_normalised` (https://arxiv.org/abs/2601.05242).
  Lite PPO: `advantages.group_relative_batch`, `losses.ppo_clip`, `reduce.token_mean`, no KL (https://arxiv.org/abs/2508.08221).
  GSPO: `losses.gspo`, `reduce.sequence_mean`, no KL (https://arxiv.org/abs/2507.18071).
  CISPO: `losses.cispo`, `reduce.token_mean`, no KL (https://arxiv.org/abs/2506.13585).
  Decoupled PPO: `losses.ppo_clip`, correction `corrections.truncated_is_token` (https://arxiv.org/abs/2110.00641).
  Unbiased KL: unbiased_kl, with `losses.k1` or `losses.k3` (https://arxiv.org/abs/2512.02556).
  High-entropy tokens alone: mask by `reduce.top_entropy` (https://arxiv.org/abs/2506.01939).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._frozen import frozen_params
from alignax.algorithms._policy import off_policy_weights, policy_metrics, split_prefixed
from alignax.logprobs import score
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Sampled rows with what is constant about them."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], tokens the policy chose
    advantages: Array  # float32 [B], or [B, T]
    old_logp: Array | None = None  # float32 [B, T], by the trainer; None: the batch is on-policy, and the ratio is 1
    ref_logp: Array | None = None  # float32 [B, T]; None: computed in the step from frozen["reference"]
    weights: Array | None = None  # float32 [B]; a filler row weighs 0
    rollout_logp: Array | None = None  # float32 [B, T], by the sampler's arithmetic; None: nothing corrects for it


def make_loss(
    model: Model,
    *,
    policy_loss: Callable[..., Array] = losses.ppo_clip,
    kl: Callable[..., Array] | None = losses.k3,
    kl_weight: Scalar = 0.04,
    unbiased_kl: bool = False,
    entropy_weight: Scalar | None = None,
    correction: Callable[..., Array] | None = None,
    off_policy_threshold: Scalar | None = None,
    temperature: Scalar = 1.0,
    mean: Callable[..., Mean] = reduce.sequence_mean,
) -> LossFn:
    """Makes the loss function mean(correction * policy_loss) + kl_weight * mean(kl) - entropy_weight * mean(entropy).

    Args:
      model: the model to train.
      policy_loss: any `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`.
      kl: an estimator of KL(policy || reference) from `alignax.losses`; None: no reference is needed or read.
      kl_weight: its weight (paper: beta).
      unbiased_kl: multiply the estimate by the ratio of the policies, so that samples of the old one estimate the KL of
        the new one, in value and in gradient ("DeepSeek-V3.2", https://arxiv.org/abs/2512.02556, section 3.1).
      entropy_weight: of the entropy bonus; None: there is none, and its gradient costs nothing.
      correction: weights `(old_logp, rollout_logp, mask, *, ...) -> [B, T]` from `alignax.corrections`, which multiply
        the policy loss; the batch then needs `rollout_logp`. With `truncated_is_token` this is decoupled PPO.
      off_policy_threshold: leaves out the policy loss of bad rows whose average log-probability has fallen by more than
        this since they were sampled, see `alignax.corrections.off_policy_mask`; None: of no row.
      temperature: the sampler's, at which log-probabilities are taken.
      mean: a reduction of `alignax.reduce`, for all terms.

    Raises:
      ValueError: for a KL estimator that means nothing in a loss.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `hyper` may override `kl_weight`,
      `entropy_weight`, `off_policy_threshold` and `temperature` and holds the policy loss's own hyperparameters, and as
      `correction_NAME` those of the correction. Metrics: `kl` (sum over a row of k3, mean over rows), `entropy`,
      `ratio`, `ratio/max`, `approx_kl` (k3 between old and new policy, per token), `clip_fraction` (tokens whose
      gradient the policy loss took away) and, of a batch with `rollout_logp`, `sampling/NAME` with the names of
      `alignax.corrections.mismatch_metrics` and `sampling/kept_rows` where a threshold is given.
    """
    _check_kl(kl, unbiased_kl)
    defaults = {
        "kl_weight": kl_weight,
        "temperature": temperature,
        "entropy_weight": entropy_weight,
        "off_policy_threshold": off_policy_threshold,
    }

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        batch = blank(batch)
        own: dict[str, Any] = {name: hyper.get(name, default) for name, default in defaults.items()}
        hyper = {name: value for name, value in hyper.items() if name not in defaults}
        hyper, correction_hyper = split_prefixed(hyper, "correction_")

        def scored(weights: Params, want: tuple[str, ...] = ()):
            rows = (batch.tokens, batch.segments)
            return score(model, weights, *rows, mask=batch.mask, temperature=own["temperature"], want=want)

        def averaged(per_token: Array) -> Mean:
            return mean(per_token, batch.mask, batch.weights)

        scores = scored(params, want=("entropy",))
        old_logp = jax.lax.stop_gradient(scores.logp) if batch.old_logp is None else batch.old_logp
        advantages = _per_token(batch.advantages, batch.mask)
        arguments = (scores.logp, old_logp, advantages, batch.mask)
        weigh = partial(off_policy_weights, correction=correction, threshold=own["off_policy_threshold"])
        weights, metrics = weigh(*arguments, batch.rollout_logp, batch.weights, correction_hyper)
        policy = policy_loss(*arguments, **hyper)
        terms = {"policy": Term(1.0, averaged(policy if weights is None else weights * policy))}
        metrics |= policy_metrics(policy_loss, *arguments, batch.weights, hyper)
        metrics["entropy"] = reduce.token_mean(scores.entropy, batch.mask, batch.weights)
        if own["entropy_weight"] is not None:
            terms["entropy"] = Term(-own["entropy_weight"], averaged(scores.entropy))
        if kl is not None:
            ref_logp = batch.ref_logp
            if ref_logp is None:
                said, otherwise = "grpo: the batch has no ref_logp and ", ", or a loss made with kl=None"
                ref_logp = scored(frozen_params(frozen, "reference", said, otherwise)).logp
            estimate = kl(scores.logp, ref_logp, batch.mask)
            if unbiased_kl:
                estimate *= losses.importance_ratio(scores.logp, old_logp, batch.mask)
            terms["kl"] = Term(own["kl_weight"], averaged(estimate))
            per_token = losses.k3(scores.logp, ref_logp, batch.mask)
            metrics["kl"] = reduce.sequence_sum(per_token, batch.mask, batch.weights)
        return terms, jax.lax.stop_gradient(metrics)

    return loss_fn


def _check_kl(kl: Callable[..., Array] | None, unbiased_kl: bool) -> None:
    # of samples of the policy; times the live ratio, k1 and k3 have the exact gradient, and the others lose it
    nothing = {losses.absolute: "is no KL", losses.k3_forward: "estimates from samples of the reference"}
    if unbiased_kl:
        others = (losses.k2, losses.k1_straight_through, losses.k3_straight_through)
        nothing |= dict.fromkeys(others, "has its gradient without the ratio that unbiased_kl multiplies it with")
    else:
        nothing[losses.k1] = "has an expected gradient of 0"
    if kl is not None and kl in nothing:
        raise ValueError(
            f"grpo: kl={kl.__name__} {nothing[kl]}; expected k2, k3 or k3_straight_through in a loss, k1 or k3 with "
            "unbiased_kl, or k1 in the reward (rewards.shaped_rewards)"
        )


def _per_token(advantages: Array, mask: Array) -> Array:
    chex.assert_shape(advantages, mask.shape if advantages.ndim == 2 else mask.shape[:1])
    return advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], mask.shape)
