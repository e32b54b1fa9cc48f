"""Supervised fine-tuning: maximum likelihood of the completions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._routing import router_terms
from alignax.logprobs import score
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
    aux_weight: Scalar | None = None,
    z_weight: Scalar | None = None,
) -> LossFn:
    """Makes the loss function mean(loss(logp, mask, **hyper)) over the batch's masked-in tokens.

    For a mixture of experts it is followed by aux_weight * load_balancing + z_weight * router_z over all tokens of the
    rows, see `alignax.losses`.

    Args:
      model: the model to train.
      loss: any `loss(logp, mask, *, ...) -> [B, T]`; `hyper` holds its hyperparameters.
      mean: a reduction of `alignax.reduce`. The token mean counts the tokens of the whole batch.
      aux_weight: of the load-balancing loss (config.json: router_aux_loss_coef), over each micro-batch by itself; over
        the whole batch with `make_update(..., statistics=expert_load(model))`. None: left out.
      z_weight: of the router's z-loss, 0.001 where it was published. None: left out.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `hyper` may override the two weights.
      Metric: `mean_token_accuracy`.

    Raises:
      ValueError: when a weight is given for a model without a router.
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        batch = blank(batch)
        router = {"aux_weight": aux_weight, "z_weight": z_weight, "expert_load": None}
        own = {name: value for name, value in hyper.items() if name not in router}
        router |= {name: value for name, value in hyper.items() if name in router}
        scores = score(model, params, batch.tokens, batch.segments, mask=batch.mask, want=("correct",))
        nll = mean(loss(scores.logp, batch.mask, **own), batch.mask, batch.weights)
        accuracy = reduce.token_mean(scores.correct, batch.mask, batch.weights)
        terms = {"nll": Term(1.0, nll), **router_terms(scores.aux, router)}
        return terms, {"mean_token_accuracy": accuracy}

    return loss_fn
