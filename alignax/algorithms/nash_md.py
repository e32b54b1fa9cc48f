"""Nash-MD and Nash-EMA by policy gradient: a policy learns to be preferred over an opponent it plays against.

The rows are the policy's; what the opponent said in their place enters only as the preference of each over it. With
the geometric mixture of policy and reference as the opponent (`alignax.models.mixture`) it is Nash-MD, with an average
of the policy's past parameters (`alignax.train.ema`) Nash-EMA. See "Nash Learning from Human Feedback", Munos et al.
(https://arxiv.org/abs/2312.00886), section 7.

Recipes:
  Nash-MD: `losses.nash_md`, the opponent sampled from `models.mixture` (https://arxiv.org/abs/2312.00886).
  Nash-EMA: `losses.nash_md`, the opponent an average of past parameters, `train.ema` (https://arxiv.org/abs/2312.00886).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._frozen import frozen_params
from alignax.logprobs import score
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Rows that the policy has just sampled, with the verdict on each."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], tokens the policy chose
    preference: Array  # float32 [B], the probability that a row wins against its opponent's
    ref_logp: Array | None = None  # float32 [B, T]; None: computed in the step from frozen["reference"]
    weights: Array | None = None  # float32 [B]; a filler row weighs 0


def make_loss(
    model: Model,
    *,
    loss: Callable[..., Array] = losses.nash_md,
    kl_weight: Scalar = 0.1,
    temperature: Scalar = 1.0,
    mean: Callable[..., Mean] = reduce.sequence_sum,
) -> LossFn:
    """Makes the loss function mean(loss(logp, ref_logp, preference, mask)).

    Args:
      model: the model to train.
      loss: `losses.nash_md`, `nash_md_sequence` or `nash_md_trl`: `(logp, ref_logp, preference, mask, *, kl_weight)`.
      kl_weight: how strongly the reference holds (paper: tau).
      temperature: the sampler's, at which log-probabilities are taken.
      mean: a reduction of `alignax.reduce`; the published one is the sum over a row.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `hyper` may override `kl_weight` and
      `temperature`. Its gradient is right for rows of the policy as it is: one update for each rollout. Metrics:
      `loss/score` and `loss/kl` (the loss without its KL, and the rest), `kl` (sum over a row of k3, mean over rows),
      `entropy`, `rewards/probabilities` (the mean preference).
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        batch = blank(batch)
        own = {"kl_weight": kl_weight, "temperature": temperature} | hyper
        degree = own.pop("temperature")

        def scored(weights: Params, want: tuple[str, ...] = ()):
            rows = (batch.tokens, batch.segments)
            return score(model, weights, *rows, mask=batch.mask, temperature=degree, want=want)

        scores = scored(params, want=("entropy",))
        ref_logp = batch.ref_logp
        if ref_logp is None:
            ref_logp = scored(frozen_params(frozen, "reference", "nash_md: the batch has no ref_logp and ")).logp

        def reduced(**hyper: Scalar) -> Mean:
            tokens = loss(scores.logp, ref_logp, batch.preference, batch.mask, **hyper)
            return mean(tokens, batch.mask, batch.weights)

        policy, without = reduced(**own), reduced(**own | {"kl_weight": 0.0})
        rows = jnp.any(batch.mask != 0, axis=1).astype(jnp.float32)
        weights = rows if batch.weights is None else rows * batch.weights
        metrics = {
            "loss/score": without,
            "loss/kl": policy._replace(total=policy.total - without.total),
            "kl": reduce.sequence_sum(losses.k3(scores.logp, ref_logp, batch.mask), batch.mask, batch.weights),
            "entropy": reduce.token_mean(scores.entropy, batch.mask, batch.weights),
            "rewards/probabilities": reduce.batch_mean(batch.preference, weights),
        }
        return {"policy": Term(1.0, policy)}, jax.lax.stop_gradient(metrics)

    return loss_fn
