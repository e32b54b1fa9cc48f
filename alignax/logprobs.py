"""Log-probabilities and values of given tokens under a model. The only place that shifts tokens against states.

Every array that leaves this module is aligned with `tokens`: `logp[:, t] = log p(tokens[:, t] | tokens[:, :t])`, and 0
where nothing was predicted (column 0, the first token of a packed part, padding, what the mask leaves out).

The head runs over a few columns at a time and is recomputed in the backward pass, so that `[B, T, V]` exists in
neither direction.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from alignax.types import Array, Model, Params, Scalar


class Scores(NamedTuple):
    """Per-token results of `score`, aligned with `tokens` and 0 where nothing was predicted; None if not wanted."""

    logp: Float[Array, "B T"]
    entropy: Float[Array, "B T"] = None  # pyright: ignore  # of the whole distribution, in nats
    correct: Float[Array, "B T"] = None  # pyright: ignore  # 1.0 where the token is a most likely one
    logits: Float[Array, "B T"] = None  # pyright: ignore  # the mean logit over the vocabulary
    values: Float[Array, "B T"] = None  # pyright: ignore  # of the state before the token, from the same forward pass
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
      want: which other fields of `Scores` to compute, of "entropy", "correct", "logits" and "values" (the last needs
        a model with a scalar head: a policy that is its own critic).
      positions, parents, key: passed on to `model.hidden`.
      chunk: about how many tokens meet the vocabulary at once; more where that would make over 16 blocks of columns.

    Returns:
      `Scores`, every array `[B, T]`.

    Raises:
      ValueError: for an unknown name in `want`, values of a model without a scalar head, or a temperature that is
        known not to be positive.
    """
    chex.assert_rank([tokens, segments], 2)
    chex.assert_equal_shape([tokens, segments])
    known = Scores._fields[1:-1]
    if unknown := set(want) - set(known):
        raise ValueError(f"score: want={tuple(unknown)} is unknown; expected some of {known}")
    if not isinstance(temperature, Tracer) and temperature <= 0:
        raise ValueError(f"score: temperature={temperature}; expected a number above 0")
    hidden = model.hidden(params, tokens, segments, positions=positions, parents=parents, key=key)
    targets = jnp.roll(tokens, -1, axis=1)

    @jax.checkpoint
    def head(states: Array, targets: Array) -> dict[str, Array]:
        return _token_scores(model.logits(params, states) / temperature, targets, want)

    chosen = _predicted(segments, parents)
    if mask is not None:
        chex.assert_equal_shape([tokens, mask])
        chosen = chosen & (mask != 0)
    # at most 16 blocks: in the backward pass of sharded rows each of them sums the head's gradient over the devices
    rows, length = tokens.shape
    columns = _map_columns(head, hidden.states, targets, max(1, chunk // rows, -(-length // 16)))
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
    chosen = _predicted(segments, None)
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
    return scores


def _predicted(segments: Array, parents: Array | None) -> Array:
    """True where a token has a predecessor of its own: the column to its left belongs to its segment, or its parent."""
    segments = segments.astype(jnp.int32)
    left = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)))
    follows = left == segments
    if parents is not None:
        follows |= (left == parents) & (parents != 0)
    return follows & (segments != 0)


def _map_columns(head, states: Array, targets: Array, width: int) -> dict[str, Array]:
    """head over blocks of `width` columns. Columns, since rows may be sharded and splitting them would move data."""
    rows, length = targets.shape
    if length <= width:
        return head(states, targets)
    pad = -length % width
    states = jnp.pad(states, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))
    blocks = (length + pad) // width
    states = states.reshape(rows, blocks, width, -1).swapaxes(0, 1)
    targets = targets.reshape(rows, blocks, width).swapaxes(0, 1)
    scores = jax.lax.map(lambda block: head(*block), (states, targets))
    return {name: x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for name, x in scores.items()}
