"""Distillation: `loss(logits, teacher_logits, mask, *, ...) -> [B, T]`, of next-token distributions.

P is the teacher's distribution, a constant; Q the student's, over the same vocabulary. To keep `[B, T, V]` out of
memory, `alignax.algorithms.distillation` calls a loss on a few columns at a time.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.losses._checks import check
from alignax.losses._logistic import log1mexp
from alignax.losses.divergence import full_kl
from alignax.types import Array, Scalar

NOTHING = -1e30  # in place of -inf, whose difference from itself is NaN; its exponential is 0
LEAST_TAIL = 1e-7  # the probability of the tail is at least this, so that its logarithm stays finite


def distill_forward_kl(
    logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T W"], mask: Array
) -> Float[Array, "B T"]:
    """Forward KL distillation: KL(P || Q) = sum_v P_v (log P_v - log Q_v).

    The student covers all that the teacher would say; the loss of context distillation. See "A General Language
    Assistant as a Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861), section 2.

    Args:
      logits: `[B, T, V]`, of the student.
      teacher_logits: `[B, T, V]`, a constant.
      mask: `[B, T]`, the tokens that count.

    Raises:
      ValueError: for vocabularies of different sizes.
    """
    _check("distill_forward_kl", logits, teacher_logits, mask)
    return full_kl(jax.lax.stop_gradient(teacher_logits), logits, mask)


def distill_reverse_kl(
    logits: Float[Array, "B T V"], teacher_logits: Float[Array, "B T W"], mask: Array
) -> Float[Array, "B T"]:
    """Reverse KL distillation: KL(Q || P) = sum_v Q_v (log Q_v - log P_v).

    The student keeps to what the teacher would say, though not to all of it. See "MiniLLM: Knowledge Distillation of
    Large Language Models", Gu et al. (https://arxiv.org/abs/2306.08543), eq. 1, here token by token.

    Args:
      logits: `[B, T, V]`, of the student.
      teacher_logits: `[B, T, V]`, a constant.
      mask: `[B, T]`, the tokens that count.

    Raises:
      ValueError: for vocabularies of different sizes.
    """
    _check("distill_reverse_kl", logits, teacher_logits, mask)
    return full_kl(logits, jax.lax.stop_gradient(teacher_logits), mask)


def generalised_jsd(
    logits: Float[Array, "B T V"],
    teacher_logits: Float[Array, "B T W"],
    mask: Array,
    *,
    beta: Scalar = 0.5,
    temperature: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """Generalised JSD (GKD): beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q.

    At beta 0 it is KL(P || Q) and at beta 1 KL(Q || P): the limits of it over beta and over 1 - beta, where it would be
    0 itself. See "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes", Agarwal et al.
    (https://arxiv.org/abs/2306.13649), section 2.

    Args:
      logits: `[B, T, V]`, of the student.
      teacher_logits: `[B, T, V]`, a constant.
      mask: `[B, T]`, the tokens that count.
      beta: in [0, 1] (paper: beta).
      temperature: divides both logits; gradients shrink as 1 / temperature^2, and are not scaled back.

    Raises:
      ValueError: for vocabularies of different sizes, or numbers known to be out of range.
    """
    _check("generalised_jsd", logits, teacher_logits, mask)
    check("generalised_jsd", "beta", beta, lambda x: (x >= 0) & (x <= 1), "0 <= beta <= 1")
    check("generalised_jsd", "temperature", temperature, lambda x: x > 0, "a temperature above 0")
    chosen, beta = (mask != 0)[..., None], jnp.asarray(beta, jnp.float32)

    def log_softmax(x: Array) -> Array:
        return jnp.maximum(jax.nn.log_softmax(jnp.where(chosen, x.astype(jnp.float32), 0.0) / temperature), NOTHING)

    p, q = log_softmax(jax.lax.stop_gradient(teacher_logits)), log_softmax(logits)
    inside = jnp.where((beta > 0) & (beta < 1), beta, 0.5)  # both logarithms finite, whatever beta is
    mixture = jnp.logaddexp(p + jnp.log(inside), q + jnp.log1p(-inside))
    jsd = inside * _kl(p, mixture) + (1 - inside) * _kl(q, mixture)
    return jnp.where(beta <= 0, _kl(p, q), jnp.where(beta >= 1, _kl(q, p), jsd))


def distill_top_k(
    logits: Float[Array, "B T V"], teacher_logp: Float[Array, "B T K"], teacher_ids: Int[Array, "B T K"], mask: Array
) -> Float[Array, "B T"]:
    """Top-k distillation: KL over the teacher's k likeliest tokens and one bucket for the rest, k + 1 categories.

    What a teacher says then takes k numbers a token to store, 50 where it was published. The probability of the rest is
    at least 1e-7 on either side. See "A General Language Assistant as a Laboratory for Alignment", Askell et al.
    (https://arxiv.org/abs/2112.00861), section 2.

    Args:
      logits: `[B, T, V]`, of the student.
      teacher_logp: `[B, T, K]`, the teacher's largest log-probabilities, a constant.
      teacher_ids: `[B, T, K]`, the tokens that have them.
      mask: `[B, T]`, the tokens that count.
    """
    logits, teacher, ids = _top_k(logits, teacher_logp, teacher_ids, mask)
    normaliser = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    known = jnp.take_along_axis(logits, ids, axis=-1) - normaliser
    # from the logits of the rest: 1 - sum(p) would lose its digits where the rest is improbable
    rest = jnp.put_along_axis(logits, ids, NOTHING, axis=-1, inplace=False)
    rest = jax.nn.logsumexp(jnp.maximum(rest, NOTHING), axis=-1, keepdims=True) - normaliser
    rest = jnp.maximum(rest, log1mexp(jnp.float32(-LEAST_TAIL), -LEAST_TAIL))
    teacher_rest = log1mexp(jax.nn.logsumexp(teacher, axis=-1, keepdims=True), -LEAST_TAIL)
    teacher = jnp.concatenate([teacher, teacher_rest], axis=-1)
    return _kl(teacher, jnp.concatenate([known, rest], axis=-1))


def distill_top_k_renormalised(
    logits: Float[Array, "B T V"], teacher_logp: Float[Array, "B T K"], teacher_ids: Int[Array, "B T K"], mask: Array
) -> Float[Array, "B T"]:
    """Top-k distillation, renormalised: KL(P' || Q'), both divided by their sum over the teacher's k likeliest tokens.

    Nothing is learned about all other tokens, whatever probability they have: biased, unlike `distill_top_k`. See
    "A General Language Assistant as a Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861).

    Args:
      logits: `[B, T, V]`, of the student.
      teacher_logp: `[B, T, K]`, the teacher's largest log-probabilities, a constant.
      teacher_ids: `[B, T, K]`, the tokens that have them.
      mask: `[B, T]`, the tokens that count.
    """
    logits, teacher, ids = _top_k(logits, teacher_logp, teacher_ids, mask)
    return _kl(jax.nn.log_softmax(teacher), jax.nn.log_softmax(jnp.take_along_axis(logits, ids, axis=-1)))


def _check(loss: str, logits: Array, teacher_logits: Array, mask: Array) -> None:
    chex.assert_rank([logits, teacher_logits], 3)
    if logits.shape[-1] != teacher_logits.shape[-1]:
        raise ValueError(
            f"{loss}: logits of shape {logits.shape} and teacher_logits of shape {teacher_logits.shape}; expected one "
            f"vocabulary, not {logits.shape[-1]} tokens and {teacher_logits.shape[-1]}"
        )
    chex.assert_equal_shape([logits, teacher_logits])
    chex.assert_shape(mask, logits.shape[:2])


def _top_k(logits: Array, teacher_logp: Array, teacher_ids: Array, mask: Array) -> tuple[Array, Array, Array]:
    """The arguments without what stands under the mask; the teacher's a constant."""
    chex.assert_rank([logits, teacher_logp, teacher_ids], 3)
    chex.assert_equal_shape([teacher_logp, teacher_ids])
    chex.assert_equal_shape_prefix([logits, teacher_logp], 2)
    chex.assert_shape(mask, logits.shape[:2])
    if teacher_ids.shape[-1] > logits.shape[-1]:
        raise ValueError(f"teacher_ids of shape {teacher_ids.shape}; expected at most {logits.shape[-1]} of them")
    chosen = (mask != 0)[..., None]
    # equal ids stand for nothing, but must be distinct: one of them would be read twice
    count = jnp.arange(teacher_ids.shape[-1], dtype=teacher_ids.dtype)[None, None]
    logits = jnp.where(chosen, logits.astype(jnp.float32), 0.0)
    teacher = jnp.where(chosen, jax.lax.stop_gradient(teacher_logp).astype(jnp.float32), -math.log(logits.shape[-1]))
    return logits, teacher, jnp.where(chosen, teacher_ids, count)


def _kl(p: Array, q: Array) -> Array:
    """sum_v e^p (p - q) of log-probabilities; nothing where e^p is 0."""
    possible = p > NOTHING
    p = jnp.where(possible, p, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(p) * (p - q), 0.0), axis=-1)
