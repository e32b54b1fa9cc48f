"""Temperature, top-k, top-p and min-p, without sorting the vocabulary; penalties and forbidden tokens.

Filters are said in gaps: the gap of a token is how far it lies below the best one, in nats at the temperature. Each
filter keeps the tokens whose gap is at most some limit, so that several filters are the smallest of their limits, a
filter that is off is an infinite limit, and greedy decoding is the limit 0. The limits of top-k and top-p are found by
bisecting the bits of a float32: gaps are not negative, where floats order like their bits, so 31 steps are exact.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.types import Array

_BITS_OF_INFINITY = 0x7F800000


def gaps(logits: Float[Array, "R V"], temperature: Float[Array, " R"]) -> Float[Array, "R V"]:
    """(max(logits) - logits) / temperature, float32. exp(-gap) is the probability up to the row's normaliser.

    The maximum goes first: a small temperature then overflows to a probability of 0, and never to NaN.
    """
    logits = logits.astype(jnp.float32)
    return (jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature[:, None]


def gap_limit(
    gap: Float[Array, "R V"], *, top_k: Int[Array, " R"], top_p: Float[Array, " R"], min_p: Float[Array, " R"]
) -> Float[Array, " R"]:
    """The largest gap that top-k, then top-p among what that left, then min-p allow; infinity where all are off.

    The order and the meaning are those of transformers' logits warpers, but for ties: tokens of equal logits stand or
    fall together, in top-p too. The best token always stays. Nothing is searched while no row asks for it.
    """
    by_k = _unless_off(jnp.where((top_k > 0) & (top_k < gap.shape[-1]), top_k, 0), lambda k: top_k_limit(gap, k))
    off_at_zero = jnp.where(top_p < 1, jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny), 0.0)
    by_p = _unless_off(off_at_zero, lambda p: top_p_limit(gap, p, by_k))
    return jnp.minimum(jnp.minimum(by_k, by_p), min_p_limit(min_p))


def penalise(
    logits: Float[Array, "R V"], tokens: Int[Array, "R T"], columns: Int[Array, " R"], penalty: Float[Array, " R"]
) -> Float[Array, "R V"]:
    """Divides the positive logits of tokens that the row holds by the penalty, and multiplies the others; float32.

    The prompt counts. Nothing is looked up while no row has a penalty. See "CTRL: A Conditional Transformer Language
    Model for Controllable Generation", Keskar et al. (https://arxiv.org/abs/1909.05858), section 4.1.
    """

    logits = logits.astype(jnp.float32)  # before the branches, which must agree in it

    def penalised() -> Array:
        ids = jnp.where(jnp.arange(tokens.shape[1])[None] < columns[:, None], tokens, logits.shape[1])
        seen = _mark(jnp.zeros(logits.shape, bool), ids, True)
        factor = penalty[:, None]
        return jnp.where(seen, jnp.where(logits > 0, logits / factor, logits * factor), logits)

    return jax.lax.cond(jnp.any(penalty != 1), penalised, lambda: logits)


def forbid(logits: Float[Array, "R V"], ids: Int[Array, "R F"]) -> Float[Array, "R V"]:
    """-inf for some tokens of each row; an id of -1 is none."""
    ids = jnp.where(ids < 0, logits.shape[1], ids)  # out of bounds, and dropped
    return _mark(logits, ids, -jnp.inf) if ids.shape[1] else logits


def top_k_limit(gap: Float[Array, "R V"], top_k: Int[Array, " R"]) -> Float[Array, " R"]:
    """The gap of the k-th best token (1 <= k <= V): keeps k tokens, and more where others tie with the k-th."""
    return _smallest_limit(gap, jnp.ones_like(gap), top_k.astype(jnp.float32))


def top_p_limit(gap: Float[Array, "R V"], top_p: Float[Array, " R"], within: Float[Array, " R"]) -> Float[Array, " R"]:
    """The smallest gap up to which lies at least the part top_p of the probability of the tokens up to gap `within`.

    See "The Curious Case of Neural Text Degeneration", Holtzman et al. (https://arxiv.org/abs/1904.09751), section 3.1.
    """
    weight = jnp.where(gap <= within[:, None], jnp.exp(-gap), 0.0)
    return _smallest_limit(gap, weight, top_p * jnp.sum(weight, axis=-1))


def min_p_limit(min_p: Float[Array, " R"]) -> Float[Array, " R"]:
    """-log(min_p): keeps tokens at least min_p times as probable as the best one; infinite for 0.

    See "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", Nguyen et al.
    (https://arxiv.org/abs/2407.01082), section 3.
    """
    return jnp.maximum(-jnp.log(min_p), 0.0)


def _mark(x: Array, ids: Int[Array, "R N"], value: float | bool) -> Array:
    # mapped over the rows: where they are sharded, every device marks its own
    return jax.vmap(lambda row, own: row.at[own].set(value, mode="drop"))(x, ids)


def _unless_off(value: Array, limit: Callable[[Array], Array]) -> Array:
    """limit(value) for the rows with value > 0, infinity for the others, and no work at all when there are none."""
    infinite = jnp.full(value.shape, jnp.inf, jnp.float32)
    return jax.lax.cond(jnp.any(value > 0), lambda: jnp.where(value > 0, limit(value), infinite), lambda: infinite)


def _smallest_limit(gap: Array, weight: Array, target: Array) -> Array:
    """The smallest float32 limit [R] for which the weight of the tokens with gap <= limit reaches the target [R]."""

    def halve(_, bounds):
        below, enough = bounds
        middle = below + ((enough - below) >> 1)
        limit = jax.lax.bitcast_convert_type(middle, jnp.float32)
        reached = jnp.sum(jnp.where(gap <= limit[:, None], weight, 0.0), axis=-1) >= target
        return jnp.where(reached, below, middle), jnp.where(reached, middle, enough)

    rows = gap.shape[:1]
    bounds = jnp.full(rows, -1, jnp.int32), jnp.full(rows, _BITS_OF_INFINITY, jnp.int32)
    _, enough = jax.lax.fori_loop(0, 31, halve, bounds)
    return jax.lax.bitcast_convert_type(enough, jnp.float32)
