"""Learning from pairs: a chosen and a rejected completion of one prompt, against a frozen reference."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.logprobs import token_logprobs
from alignax.types import Array, LossFn, Model, Params, Response, Scalar, Term


class Batch(NamedTuple):
    """Pairs; index 0 of the second axis is the chosen completion, 1 the rejected one."""

    tokens: Array  # int32 [B, 2, T]
    segments: Array  # int32 [B, 2, T], 0 is padding
    mask: Array  # [B, 2, T], the completions' tokens
    ref_logp: Array | None = None  # float32 [B, 2, T]; None: computed in the step from frozen["reference"], if any
    weights: Array | None = None  # float32 [B], pair weights; a filler pair weighs 0


def make_loss(model: Model, *, loss: Callable[..., Array] = losses.dpo, beta: Scalar | None = 0.1) -> LossFn:
    """Makes the loss function mean(loss(chosen, rejected, **hyper)) over pairs.

    Args:
      model: the model to train.
      loss: any `loss(chosen: Response, rejected: Response, *, ...) -> [B]`.
      beta: its beta, unless `hyper` says otherwise; None for a loss that has none.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `frozen` is `{"reference": params}`, or
      None where the batch brings `ref_logp` or the loss needs no reference. Metrics: `rewards/chosen`,
      `rewards/rejected`, `rewards/margins` (beta times the log-ratios), `rewards/accuracies` (a tie counts as wrong),
      `logps/chosen`, `logps/rejected`.
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        hyper = hyper if beta is None else {"beta": beta} | hyper
        batch = blank(batch)
        chosen, rejected = sides(model, params, batch, frozen)
        pairs = reduce.batch_mean(loss(chosen, rejected, **hyper), batch.weights)
        return {"pairs": Term(1.0, pairs)}, pair_metrics(chosen, rejected, batch.weights, hyper.get("beta", 1.0))

    return loss_fn


def logprobs(model: Model, params: Params, batch: Batch) -> Array:
    """Log-probabilities `[B, 2, T]` of both sides: for `ref_logp` ahead of training, or for evaluation."""
    chex.assert_shape([batch.tokens, batch.segments, batch.mask], (None, 2, None))
    rows = [x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.segments, batch.mask)]
    logp = token_logprobs(model, params, rows[0], rows[1], mask=rows[2])
    return logp.reshape(batch.tokens.shape)


def sides(model: Model, params: Params, batch: Batch, frozen: Any) -> tuple[Response, Response]:
    """The chosen and the rejected `Response` of every pair."""
    logp, ref_logp = logprobs(model, params, batch), batch.ref_logp
    if ref_logp is None and frozen is not None:
        if not (isinstance(frozen, dict) and "reference" in frozen):
            raise ValueError(
                f"preference: frozen is a {type(frozen).__name__}; expected {{'reference': params}} or None"
            )
        ref_logp = jax.lax.stop_gradient(logprobs(model, frozen["reference"], batch))

    def side(i: int) -> Response:
        return Response(logp[:, i], None if ref_logp is None else ref_logp[:, i], batch.mask[:, i])

    return side(0), side(1)


def pair_metrics(chosen: Response, rejected: Response, weights: Array | None, beta: Scalar) -> dict:
    """The field's metrics of a batch of pairs, as `Mean`s."""
    reward_chosen = beta * (chosen.sum - chosen.ref_sum)
    reward_rejected = beta * (rejected.sum - rejected.ref_sum)
    values = {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/margins": reward_chosen - reward_rejected,
        "rewards/accuracies": (reward_chosen > reward_rejected).astype(jnp.float32),
        "logps/chosen": chosen.sum,
        "logps/rejected": rejected.sum,
    }
    return {name: reduce.batch_mean(jax.lax.stop_gradient(x), weights) for name, x in values.items()}
