"""Supervised fine-tuning: maximum likelihood of the completions.

Recipes:
  SFT: `losses.cross_entropy`, `reduce.token_mean` (https://arxiv.org/abs/2203.02155).
  Label smoothing: `losses.smoothed_cross_entropy` (https://arxiv.org/abs/1512.00567).
  Rejection sampling, best of n: the samples of `data.selection.best_of_n` or `data.selection.top_k_over_n` (https://arxiv.org/abs/2307.09288).
  ReST: the samples of `data.selection.rest_filter`, under a rising threshold (https://arxiv.org/abs/2308.08998).
  Reward-weighted regression: weights by `data.selection.reward_weights` (https://doi.org/10.1145/1273496.1273590).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._routing import router_terms
from alignax.logprobs import score
from alignax.losses.extras import needed
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Rows to imitate."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], tokens to learn
    weights: Array | None = None  # float32 [B], example weights; a filler row weighs 0


def make_loss(
    model: Model,
    *,
    loss: Callable[..., Array] = losses.cross_entropy,
    mean: Callable[..., Mean] = reduce.token_mean,
    z_loss_weight: Scalar | None = None,
    aux_weight: Scalar | None = None,
    z_weight: Scalar | None = None,
) -> LossFn:
    """Makes the loss function mean(loss(logp, mask, **hyper)) over the batch's masked-in tokens.

    With z_loss_weight, z_loss_weight * mean(z_loss) is added. For a mixture of experts it is followed by aux_weight *
    load_balancing + z_weight * router_z over all tokens of the rows, see `alignax.losses`.

    Args:
      model: the model to train.
      loss: any `loss(logp, mask, *, ...) -> [B, T]`; `hyper` holds its hyperparameters. What it needs beside logp
        (`alignax.losses.needs`: fields of `alignax.logprobs.Scores`) comes between the two, as for
        `losses.smoothed_cross_entropy`.
      mean: a reduction of `alignax.reduce`. The token mean counts the tokens of the whole batch.
      z_loss_weight: of `losses.z_loss` over the vocabulary, 1e-4 where it was published. None: left out.
      aux_weight: of the load-balancing loss (config.json: router_aux_loss_coef), over each micro-batch by itself; over
        the whole batch with `make_update(..., statistics=expert_load(model))`. None: left out.
      z_weight: of the router's z-loss, 0.001 where it was published. None: left out.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `hyper` may override the three weights.
      Metric: `mean_token_accuracy`.

    Raises:
      ValueError: when a weight is given for a model without a router.
    """
    extras = needed(loss)

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        batch = blank(batch)
        weights = {"z_loss_weight": z_loss_weight, "aux_weight": aux_weight, "z_weight": z_weight, "expert_load": None}
        own = {name: value for name, value in hyper.items() if name not in weights}
        weights |= {name: value for name, value in hyper.items() if name in weights}
        weigh = weights["z_loss_weight"]
        want = ("correct", *extras) if weigh is None else ("correct", "log_normalizer", *extras)
        scores = score(model, params, batch.tokens, batch.segments, mask=batch.mask, want=want)
        per_token = loss(scores.logp, *(getattr(scores, name) for name in extras), batch.mask, **own)
        terms = {"nll": Term(1.0, mean(per_token, batch.mask, batch.weights))}
        if weigh is not None:
            squares = losses.z_loss(scores.log_normalizer, batch.mask)
            terms["z_loss"] = Term(weigh, mean(squares, batch.mask, batch.weights))
        accuracy = reduce.token_mean(scores.correct, batch.mask, batch.weights)
        return terms | router_terms(scores.aux, weights), {"mean_token_accuracy": accuracy}

    return loss_fn
