"""Distillation: the student says what a frozen teacher would say, token by token.

The teacher may read other rows than the student, which end in the same tokens. With a context before them, whose effect
the student learns to have without reading it, this is context distillation. See "A General Language Assistant as a
Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861), section 2.

Recipes:
  Context distillation: `losses.distill_forward_kl`, teacher rows with the context (https://arxiv.org/abs/2112.00861).
  The same from a stored top k: `losses.distill_top_k`, `algorithms.distillation.teacher_top_k` (https://arxiv.org/abs/2112.00861).
  GKD, generalised JSD: `losses.generalised_jsd`, rows partly sampled by the student (https://arxiv.org/abs/2306.13649).
  MiniLLM's direction: `losses.distill_reverse_kl` (https://arxiv.org/abs/2306.08543).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from alignax import losses, reduce
from alignax.algorithms._fillers import blank
from alignax.algorithms._frozen import frozen_params
from alignax.logprobs import before, predicted, token_divergence, top_logprobs
from alignax.types import Array, LossFn, Mean, Model, Params, Scalar, Term


class Batch(NamedTuple):
    """Rows of the student, and those of the teacher where they differ, in the same order.

    The i-th masked-in token of a row is the same token on both sides.
    """

    tokens: Array  # int32 [B, T]
    segments: Array  # int32 [B, T], 0 is padding
    mask: Array  # [B, T], tokens to learn
    teacher_tokens: Array | None = None  # int32 [B, S], such as a context and the student's row; None: the same rows
    teacher_segments: Array | None = None  # int32 [B, S]
    teacher_mask: Array | None = None  # [B, S], the tokens of `mask`, not those of the context
    top_logp: Array | None = (
        None  # float32 [B, T, K]: what the teacher said, instead of the teacher; see `teacher_top_k`
    )
    top_ids: Array | None = None  # int32 [B, T, K]
    weights: Array | None = None  # float32 [B], example weights; a filler row weighs 0


def make_loss(
    model: Model,
    *,
    loss: Callable[..., Array] = losses.distill_forward_kl,
    teacher_model: Model | None = None,
    mean: Callable[..., Mean] = reduce.token_mean,
) -> LossFn:
    """Makes the loss function mean(loss(logits, teacher_logits, mask, **hyper)) over the batch's masked-in tokens.

    Args:
      model: the student.
      loss: any `loss(logits, teacher_logits, mask, *, ...) -> [B, T]`; `hyper` holds its hyperparameters.
      teacher_model: the teacher, over the same vocabulary; the student's model when None.
      mean: a reduction of `alignax.reduce`.

    Returns:
      `loss_fn(params, batch, frozen, hyper)` for `alignax.train.make_update`; `frozen` is `{"teacher": params}`.
      Metric: `misaligned`, the share of tokens to learn that are left out: the teacher's row holds another token in
      their place or none, or nothing stands before them.

    Raises:
      ValueError: when there is no teacher, its rows are not whole, or (of known arrays) their tokens to learn differ.
    """
    teacher_model = model if teacher_model is None else teacher_model

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        teacher = frozen_params(frozen, "teacher", "distillation: ")
        batch = blank(batch)
        columns, learned = _align(batch)
        own = before(model, params, batch.tokens, batch.segments)
        other = before(teacher_model, teacher, *_teacher_rows(batch)[:2])
        other = other._replace(at=jnp.take_along_axis(other.at, columns, axis=1))

        def divergence(logits: Array, teacher_logits: Array) -> Array:
            return loss(logits, teacher_logits, jnp.ones(logits.shape[:2]), **hyper)

        per_token = token_divergence(divergence, (own, other), learned)
        return _terms(per_token, learned, batch, mean)

    return loss_fn


def make_top_k_loss(
    model: Model,
    *,
    loss: Callable[..., Array] = losses.distill_top_k,
    mean: Callable[..., Mean] = reduce.token_mean,
) -> LossFn:
    """Makes the same of a teacher that has spoken before: mean(loss(logits, top_logp, top_ids, mask, **hyper)).

    Args:
      model: the student.
      loss: `losses.distill_top_k` or `losses.distill_top_k_renormalised`.
      mean: a reduction of `alignax.reduce`.

    Returns:
      `loss_fn(params, batch, frozen, hyper)`, which needs nothing frozen and no rows of the teacher.

    Raises:
      ValueError: for a batch without the teacher's answers.
    """

    def loss_fn(params: Params, batch: Batch, frozen: Any, hyper: dict[str, Scalar]):
        del frozen
        logp, ids = batch.top_logp, batch.top_ids
        if logp is None or ids is None:
            raise ValueError("distillation: a batch without top_logp and top_ids; expected what teacher_top_k returns")
        chex.assert_equal_shape([logp, ids])
        batch = blank(batch)
        learned = predicted(batch.segments) & (batch.mask != 0)
        own = before(model, params, batch.tokens, batch.segments)

        def divergence(logits: Array, logp: Array, ids: Array) -> Array:
            return loss(logits, logp, ids, jnp.ones(logits.shape[:2]), **hyper)

        per_token = token_divergence(divergence, (own,), learned, logp, ids)
        return _terms(per_token, learned, batch, mean)

    return loss_fn


def teacher_top_k(model: Model, params: Params, batch: Batch, *, k: int = 50, temperature: Scalar = 1.0) -> Batch:
    """The batch with what the teacher says at every token to learn: its k largest log-probabilities, and of what.

    Ahead of training, once for every row; the teacher's rows are left out of what is returned.

    Args:
      model, params: the teacher.
      batch: rows of both.
      k: how many (50 where it was published).
      temperature: divides the teacher's logits.
    """
    columns, learned = _align(batch)
    side = before(model, params, *_teacher_rows(batch)[:2])
    side = side._replace(at=jnp.take_along_axis(side.at, columns, axis=1))
    logp, ids = top_logprobs(side, learned, k=k, temperature=temperature)
    rows = {"teacher_tokens": None, "teacher_segments": None, "teacher_mask": None}
    return batch._replace(**rows, top_logp=logp, top_ids=ids, mask=learned)


def _teacher_rows(batch: Batch) -> tuple[Array, Array, Array]:
    own = (batch.teacher_tokens, batch.teacher_segments, batch.teacher_mask)
    if all(x is None for x in own):
        return batch.tokens, batch.segments, batch.mask
    tokens, segments, mask = own
    if tokens is None or segments is None or mask is None:
        raise ValueError(
            "distillation: expected teacher_tokens, teacher_segments and teacher_mask, or none of them, not "
            f"{[name for name, x in zip(Batch._fields[3:6], own, strict=True) if x is not None]} alone"
        )
    return tokens, segments, mask


def _align(batch: Batch) -> tuple[Array, Array]:
    """For every column of the student the teacher's column of the same token, and where both predict that token."""
    tokens, segments, mask = _teacher_rows(batch)
    chex.assert_rank([batch.tokens, tokens], 2)
    chex.assert_equal_shape([batch.tokens, batch.segments, batch.mask])
    chex.assert_equal_shape([tokens, segments, mask])
    chex.assert_equal_shape_prefix([batch.tokens, tokens], 1)
    ours, theirs = batch.mask != 0, mask != 0
    place = jnp.cumsum(ours, axis=1) - 1  # the how-manieth token to learn a column holds
    order = jnp.argsort(~theirs, axis=1, stable=True)  # the teacher's columns, those to learn from first
    columns = jnp.take_along_axis(order, jnp.clip(place, 0, tokens.shape[1] - 1), axis=1)
    same = place < jnp.sum(theirs, axis=1, keepdims=True)
    same &= jnp.take_along_axis(tokens, columns, axis=1) == batch.tokens
    _check_aligned(ours, theirs, same, batch.weights)
    heard = jnp.take_along_axis(predicted(segments), columns, axis=1)
    return columns, ours & same & heard & predicted(batch.segments)


def _check_aligned(ours: Array, theirs: Array, same: Array, weights: Array | None) -> None:
    if any(isinstance(x, Tracer) for x in (ours, theirs, same, weights)):
        return
    counts = np.sum(ours, axis=1), np.sum(theirs, axis=1)
    wrong = (counts[0] != counts[1]) | np.any(np.asarray(ours & ~same), axis=1)
    for row in np.flatnonzero(wrong if weights is None else wrong & (np.asarray(weights) != 0)):
        raise ValueError(
            f"distillation: row {row} has {counts[0][row]} tokens to learn, the teacher's {counts[1][row]}; expected "
            "the same tokens in the same order"
        )


def _terms(per_token: Array, learned: Array, batch: Batch, mean: Callable[..., Mean]):
    per_token = jnp.where(learned, per_token, 0.0)
    left_out = (batch.mask != 0) & ~learned
    metrics = {"misaligned": reduce.token_mean(left_out.astype(jnp.float32), batch.mask, batch.weights)}
    return {"distillation": Term(1.0, mean(per_token, learned, batch.weights))}, metrics
