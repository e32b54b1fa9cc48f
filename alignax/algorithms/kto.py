"""Learning from single answers, each good or bad, against a frozen reference: KTO, BCO, unpaired APO-zero.

Recipes:
  KTO: `losses.kto`, statistics `algorithms.kto.make_statistics` (https://arxiv.org/abs/2402.01306).
  BCO: `losses.bco`, the same statistics, weights of `losses.udm_weights` (https://arxiv.org/abs/2404.04656).
  APO-zero, unpaired: `losses.apo_zero_unpaired` (https://arxiv.org/abs/2408.06266).
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.algorithms._fillers import blank, without_empty
from alignax.algorithms._frozen import frozen_params
from alignax.logprobs import token_logprobs
from alignax.losses._sides import log_ratio
from alignax.types import Array, LossFn, Max, Mean, Model, Params, Response, Scalar, Term


class Batch(NamedTuple):
    """Answers, and for KTO as many mismatched rows: prompt i with the answer of another row of the whole batch."""

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], the answers' tokens
    desirable: Array  # bool [B]
    mismatched_tokens: Array | None = None  # int32 [B, T']
    mismatched_segments: Array | None = None  # int32 [B, T']
    mismatched_mask: Array | None = None  # [B, T']; a row that has no other's answer has an empty one, and is left out
    ref_logp: Array | None = None  # float32 [B, T]; None: computed in the step from frozen["reference"]
    mismatched_ref_logp: Array | None = None  # float32 [B, T'], likewise
    undesirable_weight: Array | None = None  # float32 [B], of rows that are bad: `losses.udm_weights` for BCO
    weights: Array | None = None  # float32 [B], row weights; a filler row weighs 0


Statistics = Callable[..., dict[str, Mean | Max]]


def make_loss(model: Model, *, loss: Callable[..., Array] = losses.kto) -> LossFn:
    """Makes the loss function mean(loss(response, desirable, **hyper)) over the rows of both classes.

    Args:
      model: the model to train.
      loss: any `loss(response: Response, desirable, ...) -> [B]`. An argument `kl` or `delta` comes from
        `make_statistics`; its hyperparameters from `hyper`, and `undesirable_weight` from the batch where that has it.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `frozen` is `{"reference": params}`, or
      None where the batch brings the reference's log-probabilities. Metrics: `rewards/chosen`, `rewards/rejected` (beta
      times the log-ratio), `logps/chosen`, `logps/rejected`, each of one class and 0 where that is missing, which
      `desirable_fraction` tells; `kl` (clamped at 0) or `delta`; `dropped/empty`, the share of the answers without
      tokens, which weigh nothing.
    """
    default_beta = _default_beta(loss)

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        batch, empty = without_empty(batch)
        batch, hyper = blank(batch), {name: x for name, x in hyper.items() if name != "delta_rate"}
        if missing := [name for name in _coupled(loss) if name not in hyper]:
            raise ValueError(
                f"kto: the loss needs {missing[0]}, a number of the whole batch, and hyper holds {sorted(hyper)}; give "
                "make_update statistics=kto.make_statistics(model, loss=loss)"
            )
        if batch.undesirable_weight is not None:
            hyper["undesirable_weight"] = batch.undesirable_weight
        answers = response(model, params, batch, frozen)
        rows = reduce.batch_mean(loss(answers, batch.desirable, **hyper), batch.weights)
        metrics = class_metrics(answers, batch, hyper.get("beta", default_beta)) | {"dropped/empty": empty}
        for name in _coupled(loss):
            value = jnp.asarray(hyper[name], jnp.float32)
            metrics[name] = Mean(jnp.maximum(value, 0.0) if name == "kl" else value, jnp.ones(()))
        return {"rows": Term(1.0, rows)}, metrics

    return loss_fn


def make_statistics(model: Model, *, loss: Callable[..., Array] = losses.kto) -> Statistics | None:
    """Makes what `alignax.train.make_update(statistics=...)` takes for this loss; None for one that needs nothing.

    For an argument `kl` the mean log-ratio of the mismatched rows, which costs a forward pass of them; for `delta` the
    mean reward of the rows. BCO's delta is the mean of all batches so far, and stays with the loop:

        seen += rows                                    # weighing more than 0, in this batch
        state, metrics = update(state, batch, frozen, hyper | {"delta": delta, "delta_rate": rows / seen})
        delta = metrics["delta"]                        # moved by delta_rate towards this batch's mean

    Without `delta_rate` it is that of the batch alone.
    """
    default_beta = _default_beta(loss)

    def kl(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]) -> dict[str, Mean | Max]:
        del hyper
        batch = blank(batch)
        return {"kl": losses.mismatched_kl(mismatched(model, params, batch, frozen), batch.weights)}

    def delta(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]) -> dict[str, Mean | Max]:
        batch = blank(without_empty(batch)[0])
        beta = hyper.get("beta", default_beta)
        mean = losses.mean_reward(response(model, params, batch, frozen), batch.weights, beta=beta)
        rate, before = hyper.get("delta_rate", 1.0), hyper.get("delta", 0.0)
        # every row moves the mean by its share, so that parts of the batch still add up
        return {"delta": Mean(rate * mean.total + (1 - rate) * before * mean.count, mean.count)}

    coupled = _coupled(loss)
    return {"kl": kl, "delta": delta}[coupled[0]] if coupled else None


def response(model: Model, params: Params, batch: Batch, frozen: Any) -> Response:
    """The answers as log-probabilities."""
    rows = batch.tokens, batch.segments, batch.mask
    return _response(model, params, rows, batch.ref_logp, frozen, "ref_logp")


def mismatched(model: Model, params: Params, batch: Batch, frozen: Any) -> Response:
    """The mismatched answers as log-probabilities; constants.

    Raises:
      ValueError: for a batch without them.
    """
    rows = batch.mismatched_tokens, batch.mismatched_segments, batch.mismatched_mask
    if any(x is None for x in rows):
        raise ValueError(
            "kto: batch has no mismatched_tokens, mismatched_segments and mismatched_mask; expected prompt i with the "
            "answer of another row, as alignax.data.batching.unpaired makes them"
        )
    params = jax.lax.stop_gradient(params)
    return _response(model, params, rows, batch.mismatched_ref_logp, frozen, "mismatched_ref_logp")


def class_metrics(answers: Response, batch: Batch, beta: Scalar) -> dict[str, Mean]:
    """The field's metrics of single answers, as `Mean`s over the rows of each class."""
    good = (batch.desirable != 0).astype(jnp.float32)
    weights = jnp.ones(good.shape) if batch.weights is None else batch.weights.astype(jnp.float32)
    values = {"rewards": beta * log_ratio(answers), "logps": answers.sum}
    classes = {"chosen": weights * good, "rejected": weights * (1 - good)}
    found = {
        f"{name}/{which}": reduce.batch_mean(jax.lax.stop_gradient(x), weight)
        for name, x in values.items()
        for which, weight in classes.items()
    }
    return found | {"desirable_fraction": reduce.batch_mean(good, weights)}


def _coupled(loss: Callable) -> list[str]:
    """The numbers of the whole batch that a loss takes and that it was not given."""
    parameters = inspect.signature(loss).parameters
    return [n for n in ("kl", "delta") if n in parameters and parameters[n].default is inspect.Parameter.empty]


def _default_beta(loss: Callable) -> Scalar:
    parameters = inspect.signature(loss).parameters
    return parameters["beta"].default if "beta" in parameters else 1.0


def _response(model: Model, params: Params, rows: tuple, ref_logp: Array | None, frozen: Any, name: str) -> Response:
    chex.assert_equal_shape(rows)
    tokens, segments, mask = rows
    if ref_logp is None:
        reference = frozen_params(frozen, "reference", f"kto: batch.{name} is None and ")
        ref_logp = token_logprobs(model, reference, tokens, segments, mask=mask)
    return Response(token_logprobs(model, params, tokens, segments, mask=mask), ref_logp, mask)
