"""Log-probabilities and values of given tokens under a model. The only place that shifts tokens against states.

Every array that leaves this module is aligned with `tokens`: `logp[:, t] = log p(tokens[:, t] | tokens[:, :t])`, and 0
where nothing was predicted (column 0, the first token of a packed part, padding, what the mask leaves out).

Tokens that are asked for meet the vocabulary a block at a time (`alignax.blockwise`), so that `[B, T, V]` exists in
neither direction, and prompts and padding cost nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float, Int

from alignax.blockwise import Side, measured
from alignax.losses.divergence import full_kl
from alignax.types import Array, Hidden, Model, Params, Scalar


class Scores(NamedTuple):
    """Per-token results of `score`, aligned with `tokens` and 0 where nothing was predicted; None if not wanted."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"] = None  # pyright: ignore  # of the whole distribution, in nats
    correct: Float[Array, "B T"] = None  # pyright: ignore  # 1.0 where the token is a most likely one
    logits: Float[Array, "B T"] = None  # pyright: ignore  # the mean logit over the vocabulary
    values: Float[Array, "B T"] = None  # pyright: ignore  # of the state before the token, from the same forward pass
    mean_logp: Float[Array, "B T"] = None  # pyright: ignore  # the mean of log p over the vocabulary
    log_normalizer: Float[Array, "B T"] = None  # pyright: ignore  # logsumexp(logits)
    log_sum_p2: Float[Array, "B T"] = None  # pyright: ignore  # log sum_v p_v^2, the log of the expected probability
    ref_logp: Float[Array, "B T"] = None  # pyright: ignore  # under `reference`, a constant
    forward_kl: Float[Array, "B T"] = None  # pyright: ignore  # KL(reference || policy) of the whole distribution
    aux: dict[str, Array] = {}  # noqa: RUF012  what the model's body returned beside its states


def score(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Array,
    *,
    mask: Array | None = None,
    temperature: Scalar = 1.0,
    want: tuple[str, ...] = (),
    reference: Params | None = None,
    positions: Array | None = None,
    parents: Array | None = None,
    key: Array | None = None,
    chunk: int | None = None,
) -> Scores:
    """Scores given tokens: log softmax(logits / temperature) at each token, float32.

    Args:
      model: any `Model`.
      params: its parameters.
      tokens: token ids `[B, T]`.
      segments: `[B, T]`, 0 (or False) for padding, k >= 1 for the k-th packed part of the row.
      mask: `[B, T]`, the tokens to score; all that can be predicted when None.
      temperature: divides the logits, a number, or `[B]` of each row and then a constant; the sampler's, above 0.
      want: which other fields of `Scores` to compute, by name. "values" needs a model with a scalar head (a policy that
        is its own critic), "ref_logp" and "forward_kl" a `reference`.
      reference: parameters of a frozen copy of the model, read beside it.
      positions, parents, key: passed on to `model.hidden`.
      chunk: about how many tokens meet the vocabulary at once; see `alignax.blockwise.measured`.

    Returns:
      `Scores`, every array `[B, T]`.

    Raises:
      ValueError: for an unknown name in `want`, values of a model without a scalar head, a missing reference, or a
        temperature that is known not to be positive.
    """
    chex.assert_rank([tokens, segments], 2)
    chex.assert_equal_shape([tokens, segments])
    known = Scores._fields[1:-1]
    if unknown := set(want) - set(known):
        raise ValueError(f"score: want={tuple(unknown)} is unknown; expected some of {known}")
    if not isinstance(temperature, Tracer) and np.any(np.asarray(temperature) <= 0):
        raise ValueError(f"score: temperature={temperature}; expected a number above 0")
    both = [name for name in ("ref_logp", "forward_kl") if name in want]
    if both and reference is None:
        raise ValueError(f"score: want={tuple(both)} without a reference; expected the reference's parameters")
    where = {"positions": positions, "parents": parents}
    hidden = model.hidden(params, tokens, segments, **where, key=key)
    sides = (_side(model, params, hidden, tokens),)
    if both:
        reference = jax.lax.stop_gradient(reference)
        sides += (_side(model, reference, model.hidden(reference, tokens, segments, **where), tokens),)
    chosen = predicted(segments, parents)
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])
        chosen = chosen & (mask != 0)

    heat = jnp.broadcast_to(jnp.expand_dims(temperature, 1), tokens.shape) if jnp.ndim(temperature) else None

    def measure(logits: tuple[Array, ...], arrays: tuple, known: dict[str, Array] | None) -> dict[str, Array]:
        # 0 stands where no token does
        divisor = temperature if arrays[1] is None else jnp.expand_dims(jnp.where(arrays[1] == 0, 1, arrays[1]), 2)
        own, *others = (x / divisor for x in logits)
        scores = _token_scores(own, arrays[0], want, known)
        for ref_logits in others:
            scores |= _both_scores(own, ref_logits, arrays[0], want)
        return scores

    found = measured(measure, sides, (tokens, heat), chosen, chunk=chunk)
    found = {name: x for name, x in found.items() if name in ("logp", *want)}
    if "values" in want:
        values = _read(_values(model, params, hidden.states), sides[0].at)
        found["values"] = jnp.where(chosen, values, 0.0)
    return Scores(**found, aux=hidden.aux)


def token_logprobs(
    model: Model,
    params: Params,
    tokens: Int[Array, "B T"],
    segments: Array,
    *,
    mask: Array | None = None,
    temperature: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """Log-probability of every token given those before it; see `score`."""
    return score(model, params, tokens, segments, mask=mask, temperature=temperature).logp


def token_divergence(
    divergence: Callable[..., Array],
    sides: tuple[Side, ...],
    mask: Array,
    *arrays: Array,
    chunk: int | None = None,
) -> Float[Array, "B T"]:
    """divergence(logits of each side [b, n, V], *arrays [b, n, ...]) -> [b, n] at every token of the mask, 0 elsewhere.

    `[B, T, V]` exists in neither direction. Stop the gradient of a side that is frozen.

    Args:
      divergence: of next-token distributions, given as logits.
      sides: one for each of these, see `before`.
      mask: `[B, T]`, the tokens to compare at.
      arrays: `[B, T, ...]`, what else it reads; constants.
      chunk: as in `score`.
    """
    chex.assert_rank(mask, 2)

    def measure(logits: tuple[Array, ...], arrays: tuple[Array, ...], known: Any) -> dict[str, Array]:
        del known
        return {"divergence": divergence(*logits, *arrays)}

    return measured(measure, sides, arrays, mask != 0, chunk=chunk)["divergence"]


def top_logprobs(
    side: Side, mask: Array, *, k: int, temperature: Scalar = 1.0, chunk: int | None = None
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """The k largest log-probabilities at every token of the mask, and of which tokens they are; 0 elsewhere."""

    def measure(logits: tuple[Array], arrays: tuple, known: Any) -> dict[str, Array]:
        del arrays, known
        logp, ids = jax.lax.top_k(jax.nn.log_softmax(logits[0] / temperature), k)
        return {"logp": logp, "ids": ids}

    found = measured(measure, (side,), (), mask != 0, chunk=chunk)
    return found["logp"], found["ids"]


def before(model: Model, params: Params, tokens: Int[Array, "B T"], segments: Array) -> Side:
    """The states that predict the tokens, and the head that does: a side of `token_divergence`."""
    return _side(model, params, model.hidden(params, tokens, segments), tokens)


def token_values(
    model: Model, params: Params, tokens: Int[Array, "B T"], segments: Array, *, mask: Array | None = None
) -> Float[Array, "B T"]:
    """The value of the state before every token, aligned with `tokens` and 0 where `score` has 0: what a critic says.

    Args:
      model: a `Model` with a scalar head, see `alignax.models.with_score`.
      params: its parameters.
      tokens, segments, mask: as for `score`.

    Raises:
      ValueError: for a model without a scalar head.
    """
    chex.assert_rank([tokens, segments], 2)
    chex.assert_equal_shape([tokens, segments])
    hidden = model.hidden(params, tokens, segments)
    chosen = predicted(segments)
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])
        chosen = chosen & (mask != 0)
    values = _read(_values(model, params, hidden.states), _side(model, params, hidden, tokens).at)
    return jnp.where(chosen, values, 0.0)


def last_score(model: Model, params: Params, tokens: Int[Array, "B T"], segments: Array) -> Float[Array, " B"]:
    """The scalar at the last token of every row that is not padding, 0 for a row of padding.

    It is a reward model's score of the row, and the value of the state after it, for rows that were cut off.

    Args:
      model: a `Model` with a scalar head, see `alignax.models.with_score`.
      params: its parameters.
      tokens: `[B, T]`, contiguous rows.
      segments: `[B, T]`, 0 (or False) for padding; the rows are not packed.

    Raises:
      ValueError: for a model without a scalar head.
    """
    chex.assert_rank([tokens, segments], 2)
    chex.assert_equal_shape([tokens, segments])
    hidden = model.hidden(params, tokens, segments)
    length = jnp.sum((segments != 0).astype(jnp.int32), axis=1)
    last = jnp.take_along_axis(_at(hidden, tokens), jnp.maximum(length - 1, 0)[:, None], axis=1)
    return jnp.where(length > 0, _values(model, params, _read(hidden.states, last)[:, 0]), 0.0)


def predicted(segments: Array, parents: Array | None = None) -> Array:
    """True `[B, T]` where a token has a predecessor: the column to its left belongs to its segment, or its parent."""
    segments = segments.astype(jnp.int32)
    left = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    follows = left == segments
    if parents is not None:
        follows |= (left == parents) & (parents != 0)
    return follows & (segments != 0)


def _values(model: Model, params: Params, states: Array) -> Array:
    if model.values is None:
        raise ValueError("the model has no scalar head; a reward model or critic is alignax.models.with_score(model)")
    return model.values(params, states)


def _at(hidden: Hidden, tokens: Array) -> Int[Array, "B T"]:
    """Which of the states of its row, or of its bundle of rows, is that of each token."""
    if hidden.at is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    chex.assert_equal_shape([hidden.at, tokens])
    return hidden.at


def _side(model: Model, params: Params, hidden: Hidden, tokens: Array) -> Side:
    """The state before each token: here tokens are shifted against states."""
    at = jnp.pad(_at(hidden, tokens)[:, :-1], ((0, 0), (1, 0)))
    return Side(lambda x: model.logits(params, x), hidden.states, at)


def _read(x: Float[Array, "R M ..."], at: Int[Array, "B C"]) -> Float[Array, "B C ..."]:
    found = jax.vmap(lambda row, own: row[own])(x, at.reshape(x.shape[0], -1))
    return found.reshape(*at.shape, *x.shape[2:])


def _token_scores(logits: Array, targets: Array, want: tuple[str, ...], known: dict | None) -> dict[str, Array]:
    # gather minus logsumexp: a log_softmax would write another array of the size of the logits
    normaliser = jax.nn.logsumexp(logits, axis=-1) if known is None else _known(logits, known["log_normalizer"])
    target = _entry(logits, targets)
    scores = {"logp": target - normaliser, "log_normalizer": normaliser}
    if "entropy" in want:
        p = jnp.exp(logits - normaliser[..., None])
        # p = 0 beside a logit of -inf must give 0, not NaN
        scores["entropy"] = normaliser - jnp.sum(jnp.where(p > 0, p * logits, 0.0), axis=-1)
    if "correct" in want:
        scores["correct"] = (target >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    if "logits" in want:
        scores["logits"] = jnp.mean(logits, axis=-1)
    if "mean_logp" in want:
        scores["mean_logp"] = jnp.mean(logits, axis=-1) - normaliser
    if "log_sum_p2" in want:
        scores["log_sum_p2"] = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * normaliser
    return scores


def _both_scores(logits: Array, ref_logits: Array, targets: Array, want: tuple[str, ...]) -> dict[str, Array]:
    ref_logits = jax.lax.stop_gradient(ref_logits)
    scores = {"ref_logp": _token_scores(ref_logits, targets, (), None)["logp"]} if "ref_logp" in want else {}
    if "forward_kl" in want:
        scores["forward_kl"] = full_kl(ref_logits, logits, jnp.ones(targets.shape))
    return scores


@jax.custom_vjp
def _known(logits: Array, normaliser: Array) -> Array:
    """logsumexp(logits), which was computed before: the gradient then needs no maximum and no sum."""
    return normaliser


def _known_forward(logits: Array, normaliser: Array):
    return normaliser, (logits, normaliser)


def _known_backward(kept: tuple[Array, Array], cotangent: Array):
    logits, normaliser = kept
    return cotangent[..., None] * jnp.exp(logits - normaliser[..., None]), jnp.zeros_like(normaliser)


_known.defvjp(_known_forward, _known_backward)


@jax.custom_vjp
def _entry(logits: Array, targets: Array) -> Array:
    """logits[..., targets]; its gradient is a comparison that fuses with others, not a scatter into zeros."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _entry_forward(logits: Array, targets: Array):
    return _entry(logits, targets), (logits, targets)


def _entry_backward(kept: tuple[Array, Array], cotangent: Array):
    logits, targets = kept
    hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return jnp.where(hit, cotangent[..., None], 0.0), None


_entry.defvjp(_entry_forward, _entry_backward)
