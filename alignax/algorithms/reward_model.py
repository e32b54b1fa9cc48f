"""Reward models: a scalar for a whole row, learned from pairs of which one side was preferred.

See "Training language models to follow instructions with human feedback", Ouyang et al.
(https://arxiv.org/abs/2203.02155), section 3.5.

Recipes:
  Reward model: `losses.bradley_terry`, preference 1 - eps for labels wrong with probability eps
    (https://arxiv.org/abs/2203.02155).
  Llama 2's: margin by rating, scores joined by `rewards.llama2_scores` (https://arxiv.org/abs/2307.09288).
  Centred scores: `losses.reward_centering`, weight 0.01 (https://arxiv.org/abs/2312.09244).
  Ensembles: `rewards.ensemble_mean`, `rewards.ensemble_min`, `rewards.ensemble_variance_penalised` (https://arxiv.org/abs/2310.02743).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.logprobs import last_score
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Pairs; index 0 of the second axis is the chosen row, 1 the rejected one."""

    tokens: Array  # int32 [B, 2, T], prompt and completion
    segments: Array  # int32 [B, 2, T], 0 is padding
    margin: Array | None = None  # float32 [B], by how much the chosen score should win; None: 0
    preference: Array | None = None  # float32 [B], the probability that the chosen side is preferred; None: 1
    weights: Array | None = None  # float32 [B], pair weights; a filler pair weighs 0


def make_loss(
    model: Model, *, loss: Callable[..., Array] = losses.bradley_terry, centering_weight: Scalar = 0.0
) -> LossFn:
    """Makes the loss function mean(loss(chosen, rejected)) + centering_weight * mean((chosen + rejected)^2).

    Args:
      model: with a scalar head, see `alignax.models.with_score`.
      loss: any `loss(chosen [B], rejected [B], *, ...) -> [B]` of scores. It gets the batch's `margin` and
        `preference` where the batch has them.
      centering_weight: pins the scores around 0, which pairs alone leave open; 0.01 is usual. See "Helping or Herding?
        Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking", Eisenstein et al.
        (https://arxiv.org/abs/2312.09244).

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; nothing frozen is needed; `hyper` may
      override `centering_weight` and holds the loss's own hyperparameters (`preference` below 1 for every pair is
      label smoothing). Metrics: `rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies` (a tie
      counts as wrong).
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        hyper = {"centering_weight": centering_weight} | hyper
        centering = hyper.pop("centering_weight")
        batch = blank(batch)
        hyper |= {name: x for name in ("margin", "preference") if (x := getattr(batch, name)) is not None}
        chosen, rejected = scores(model, params, batch).T
        pairs = reduce.batch_mean(loss(chosen, rejected, **hyper), batch.weights)
        centred = reduce.batch_mean(losses.reward_centering(chosen, rejected), batch.weights)
        terms = {"pairs": Term(1.0, pairs), "centering": Term(centering, centred)}
        return terms, score_metrics(chosen, rejected, batch.weights)

    return loss_fn


def scores(model: Model, params: Params, batch: Batch) -> Array:
    """The scores `[B, 2]` of both sides of every pair."""
    chex.assert_shape([batch.tokens, batch.segments], (None, 2, None))
    tokens, segments = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments))
    return last_score(model, params, tokens, segments).reshape(-1, 2)


def score_metrics(chosen: Array, rejected: Array, weights: Array | None) -> dict[str, Mean]:
    """The field's metrics of a batch of scored pairs."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
    }
    return {name: reduce.batch_mean(jax.lax.stop_gradient(x), weights) for name, x in values.items()}
