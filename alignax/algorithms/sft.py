"""Supervised fine-tuning: maximum likelihood of the completions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
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
) -> LossFn:
    """Makes the loss function mean(loss(logp, mask, **hyper)) over the batch's masked-in tokens.

    Args:
      model: the model to train.
      loss: any `loss(logp, mask, *, ...) -> [B, T]`; `hyper` holds its hyperparameters.
      mean: a reduction of `alignax.reduce`. The token mean counts the tokens of the whole batch.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`. Metric: `mean_token_accuracy`.
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        batch = blank(batch)
        scores = score(model, params, batch.tokens, batch.segments, mask=batch.mask, want=("correct",))
        nll = mean(loss(scores.logp, batch.mask, **hyper), batch.mask, batch.weights)
        accuracy = reduce.token_mean(scores.correct, batch.mask, batch.weights)
        return {"nll": Term(1.0, nll)}, {"mean_token_accuracy": accuracy}

    return loss_fn
