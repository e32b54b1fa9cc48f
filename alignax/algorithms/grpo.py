"""Group-relative policy optimisation: PPO's clipped objective, a group's mean reward in place of a critic.

See "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", Shao et al.
(https://arxiv.org/abs/2402.03300), eq. 3. Its relatives are other arguments: Dr. GRPO is `advantages.group_centred`
with `reduce.constant_mean`, DAPO a larger `clip_high` with `reduce.token_mean`, each without KL.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._policy import policy_metrics
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


def make_loss(
    model: Model,
    *,
    policy_loss: Callable[..., Array] = losses.ppo_clip,
    kl: Callable[..., Array] | None = losses.k3,
    kl_weight: Scalar = 0.04,
    temperature: Scalar = 1.0,
    mean: Callable[..., Mean] = reduce.sequence_mean,
) -> LossFn:
    """Makes the loss function mean(policy_loss) + kl_weight * mean(kl).

    Args:
      model: the model to train.
      policy_loss: any `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`.
      kl: an estimator of KL(policy || reference) from `alignax.losses`; None: no reference is needed or read.
      kl_weight: its weight (paper: beta).
      temperature: the sampler's, at which log-probabilities are taken.
      mean: a reduction of `alignax.reduce`, for both terms.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `hyper` may override `kl_weight` and
      `temperature` and holds the policy loss's own hyperparameters. Metrics: `kl` (sum over a row of k3, mean over
      rows), `entropy`, `ratio`, `ratio/max`, `approx_kl` (k3 between old and new policy, per token) and
      `clip_fraction` (tokens whose gradient the policy loss took away).
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        batch = blank(batch)
        own = {"kl_weight": kl_weight, "temperature": temperature}
        loss_hyper = {name: value for name, value in hyper.items() if name not in own}
        own |= {name: value for name, value in hyper.items() if name in own}

        def scored(weights: Params, want: tuple[str, ...] = ()):
            rows = (batch.tokens, batch.segments)
            return score(model, weights, *rows, mask=batch.mask, temperature=own["temperature"], want=want)

        scores = scored(params, want=("entropy",))
        old_logp = jax.lax.stop_gradient(scores.logp) if batch.old_logp is None else batch.old_logp
        advantages = _per_token(batch.advantages, batch.mask)
        arguments = (scores.logp, old_logp, advantages, batch.mask)
        policy = mean(policy_loss(*arguments, **loss_hyper), batch.mask, batch.weights)
        terms = {"policy": Term(1.0, policy)}
        metrics = policy_metrics(policy_loss, *arguments, batch.weights, loss_hyper)
        metrics["entropy"] = reduce.token_mean(scores.entropy, batch.mask, batch.weights)
        if kl is not None:
            ref_logp = scored(_reference(frozen)).logp if batch.ref_logp is None else batch.ref_logp
            terms["kl"] = Term(own["kl_weight"], mean(kl(scores.logp, ref_logp, batch.mask), batch.mask, batch.weights))
            per_token = losses.k3(scores.logp, ref_logp, batch.mask)
            metrics["kl"] = reduce.sequence_sum(per_token, batch.mask, batch.weights)
        return terms, jax.lax.stop_gradient(metrics)

    return loss_fn


def _per_token(advantages: Array, mask: Array) -> Array:
    chex.assert_shape(advantages, mask.shape if advantages.ndim == 2 else mask.shape[:1])
    return advantages if advantages.ndim == 2 else jnp.broadcast_to(advantages[:, None], mask.shape)


def _reference(frozen: Any) -> Params:
    if not (isinstance(frozen, dict) and "reference" in frozen):
        raise ValueError(
            f"grpo: the batch has no ref_logp and frozen is a {type(frozen).__name__}; expected "
            "{'reference': params}, or a loss made with kl=None"
        )
    return frozen["reference"]
