"""The method of choosing a token: logits of the next column in, a token and its two log-probabilities out."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.sampling import draw, transforms
from alignax.sampling.settings import Settings
from alignax.types import Array

# (logits [R, V], tokens [R, T], columns [R]) -> logits [R, V]
Process = Callable[[Array, Array, Array], Array]


class Chosen(NamedTuple):
    """A token of each row."""

    token: Int[Array, " R"]
    logp: Float[Array, " R"]  # under the model's own logits at the temperature alone: what a trainer computes again
    processed_logp: Float[Array, " R"]  # under what it was drawn from: after processes and filters


class Bent(NamedTuple):
    """The distribution that is drawn from: exp(-gap) up to its normaliser, where gap <= limit."""

    gap: Float[Array, "R V"]
    limit: Float[Array, " R"]


def choose(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R T"],
    columns: Int[Array, " R"],
    *,
    uniform: Float[Array, "R 2"],
    settings: Settings,
    process: tuple[Process, ...] = (),
) -> Chosen:
    """Chooses the token of each row at its column.

    Rows that ask for nothing but a temperature cost one pass for the maximum and one for the sum, when all of them do.

    Args:
      logits: the model's, for that column.
      tokens: the rows so far, 0 from that column on.
      columns: the column to be filled.
      uniform: the two numbers of each row and column, see `draw.uniforms`.
      settings: of each row.
      process: functions that change the logits before the temperature, applied in order.

    Returns:
      the token and its log-probabilities, which never depend on the draw. Greedy rows report `logp` at temperature 1,
      and a `processed_logp` of 0. Where no token is left, all of them forbidden, it is token 0 and NaN.
    """
    gap = transforms.gaps(logits, heat(settings))

    def plain() -> Chosen:
        token, total = draw.categorical(gap, jnp.full(len(gap), jnp.inf), uniform)
        logp = logp_of(gap, token, total)
        return Chosen(token, logp, logp)

    def bent() -> Chosen:
        found = bend(logits, tokens, columns, settings=settings, process=process)
        # greedy is the draw among the best at uniform = 0, which is the first of them
        at = jnp.where(settings.temperature[:, None] == 0, 0.0, uniform)
        token, total = draw.categorical(found.gap, found.limit, at)
        certain = (settings.temperature == 0) & (total > 0)
        processed_logp = jnp.where(certain, 0.0, logp_of(found.gap, token, total))
        return Chosen(token, logp_of(gap, token, jnp.sum(jnp.exp(-gap), axis=-1)), processed_logp)

    return bent() if process or settings.forbidden.shape[1] else jax.lax.cond(is_bent(settings), bent, plain)


def bend(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R T"],
    columns: Int[Array, " R"],
    *,
    settings: Settings,
    process: tuple[Process, ...] = (),
) -> Bent:
    """What is drawn from: repetition penalty, forbidden ids, processes, temperature, then the filters."""
    logits = transforms.penalise(logits, tokens, columns, settings.repetition_penalty)
    logits = transforms.forbid(logits, settings.forbidden)
    for function in process:
        logits = function(logits, tokens, columns)
    gap = transforms.gaps(logits, heat(settings))
    limit = transforms.gap_limit(gap, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p)
    return Bent(gap, jnp.where(settings.temperature == 0, 0.0, limit))


def heat(settings: Settings) -> Float[Array, " R"]:
    """The temperature, and 1 for greedy rows."""
    return jnp.where(settings.temperature == 0, 1.0, settings.temperature)


def is_bent(settings: Settings) -> Array:
    """Whether any row asks for more than a temperature."""
    return jnp.any(
        (settings.temperature == 0)
        | (settings.top_k > 0)
        | (settings.top_p < 1)
        | (settings.min_p > 0)
        | (settings.repetition_penalty != 1)
    )


def logp_of(gap: Float[Array, "R V"], token: Int[Array, " R"], total: Float[Array, " R"]) -> Float[Array, " R"]:
    """log(exp(-gap[token]) / total)."""
    return -jnp.take_along_axis(gap, token[:, None], axis=-1)[:, 0] - jnp.log(total)
