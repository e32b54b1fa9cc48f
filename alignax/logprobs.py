"""Log-probabilities and values of given tokens under a model. The only place that shifts tokens against states.

Every array that leaves this module is aligned with `tokens`: `logp[:, t] = log p(tokens[:, t] | tokens[:, :t])`, and 0
where nothing was predicted (column 0, the first token of a packed part, padding, what the mask leaves out).

The head runs over a few columns at a time and is recomputed in the backward pass, so that `[B, T, V]` exists in
neither direction.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from alignax.losses.divergence import full_kl
from alignax.types import Array, Model, Params, Scalar


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
    chunk: int = 256,
) -> Scores:
    """Scores given tokens: log softmax(logits / temperature) at each token, float32.

    Args:
      model: any `Model`.
      params: its parameters.
      tokens: token ids `[B, T]`.
      segments: `[B, T]`, 0 (or False) for padding, k >= 1 for the k-th packed part of the row.
      mask: `[B, T]`, the tokens to score; all that can be predicted when None.
      temperature: divides the logits; use the sampler's. 0 is not a temperature one can score at.
      want: which other fields of `Scores` to compute, by name. "values" needs a model with a scalar head (a policy that
        is its own critic), "ref_logp" and "forward_kl" a `reference`.
      reference: parameters of a frozen copy of the model, read beside it.
      positions, parents, key: passed on to `model.hidden`.
      chunk: about how many tokens meet the vocabulary at once; more where that would make over 16 blocks of columns.

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
    if not isinstance(temperature, Tracer) and temperature <= 0:
        raise ValueError(f"score: temperature={temperature}; expected a number above 0")
    both = [name for name in ("ref_logp", "forward_kl") if name in want]
    if both and reference is None:
        raise ValueError(f"score: want={tuple(both)} without a reference; expected the reference's parameters")
    where = {"positions": positions, "parents": parents}
    hidden = model.hidden(params, tokens, segments, **where, key=key)
    states = (hidden.states,)
    if both:
        reference = jax.lax.stop_gradient(reference)
        states += (model.hidden(reference, tokens, segments, **where).states,)

    @jax.checkpoint
    def head(targets: Array, states: Array, *ref_states: Array) -> dict[str, Array]:
        logits = model.logits(params, states) / temperature
        scores = _token_scores(logits, targets, want)
        for ref in ref_states:
            scores |= _both_scores(logits, model.logits(reference, ref) / temperature, targets, want)
        return scores

    targets = jnp.roll(tokens, -1, axis=1)
    chosen = predicted(segments, parents)
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])
        chosen = chosen & (mask != 0)
    columns = _map_columns(head, (targets, *states), chunk)
    if "values" in want:
        columns["values"] = _values(model, params, hidden.states)
    aligned = {name: jnp.where(chosen, jnp.roll(x, 1, axis=1), 0.0) for name, x in columns.items()}
    return Scores(**aligned, aux=hidden.aux)


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
    divergence: Callable[[Array, Array], Array],
    logits: Callable[[Array], Array],
    states: Float[Array, "B T D"],
    other_logits: Callable[[Array], Array],
    other_states: Float[Array, "B T E"],
    *,
    chunk: int = 256,
) -> Float[Array, "B T"]:
    """divergence(p, q) of two next-token distributions, given as the states before two heads.

    Not shifted: what stands at column t belongs to the token after it. `[B, T, V]` exists in neither direction.

    Args:
      divergence: `(logits [B, t, V], other_logits [B, t, V]) -> [B, t]`.
      logits, other_logits: the heads, `states [..., D] -> [..., V]`.
      states, other_states: of tokens that stand at the same columns; stop the gradient of a side that is frozen.
      chunk: as in `score`.
    """
    chex.assert_rank([states, other_states], 3)
    chex.assert_equal_shape_prefix([states, other_states], 2)

    @jax.checkpoint
    def head(states: Array, other_states: Array) -> dict[str, Array]:
        return {"divergence": divergence(logits(states), other_logits(other_states))}

    return _map_columns(head, (states, other_states), chunk)["divergence"]


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
    states = model.hidden(params, tokens, segments).states
    chosen = predicted(segments)
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])
        chosen = chosen & (mask != 0)
    return jnp.where(chosen, jnp.roll(_values(model, params, states), 1, axis=1), 0.0)


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
    states = model.hidden(params, tokens, segments).states
    length = jnp.sum((segments != 0).astype(jnp.int32), axis=1)
    last = jnp.take_along_axis(states, jnp.maximum(length - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(length > 0, _values(model, params, last), 0.0)


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


def _token_scores(logits: Array, targets: Array, want: tuple[str, ...]) -> dict[str, Array]:
    # gather minus logsumexp: a log_softmax would write another array of the size of the logits
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    scores = {"logp": target - normaliser}
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
    if "log_normalizer" in want:
        scores["log_normalizer"] = normaliser
    if "log_sum_p2" in want:
        scores["log_sum_p2"] = jax.nn.logsumexp(2 * logits, axis=-1) - 2 * normaliser
    return scores


def _both_scores(logits: Array, ref_logits: Array, targets: Array, want: tuple[str, ...]) -> dict[str, Array]:
    ref_logits = jax.lax.stop_gradient(ref_logits)
    scores = {"ref_logp": _token_scores(ref_logits, targets, ())["logp"]} if "ref_logp" in want else {}
    if "forward_kl" in want:
        scores["forward_kl"] = full_kl(ref_logits, logits, jnp.ones(targets.shape))
    return scores


def _map_columns(head, arrays: tuple[Array, ...], chunk: int) -> dict[str, Array]:
    """head over blocks of columns of about `chunk` tokens; rows may be sharded, and splitting them would move data."""
    rows, length = arrays[0].shape[:2]
    # at most 16 blocks: in the backward pass of sharded rows each of them sums the head's gradient over the devices
    width = max(1, chunk // rows, -(-length // 16))
    if length <= width:
        return head(*arrays)
    pad = -length % width
    blocks = (length + pad) // width

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(rows, blocks, width, *x.shape[2:]).swapaxes(0, 1)

    scores = jax.lax.map(lambda block: head(*block), jax.tree.map(split, arrays))
    return {name: x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for name, x in scores.items()}
