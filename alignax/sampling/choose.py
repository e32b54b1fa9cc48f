"""The method of choosing a token: logits of the next column in, a token and its log-probability out."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int

from alignax.sampling import draw, transforms
from alignax.types import Array

# (logits [R, V], tokens [R, T], columns [R]) -> logits [R, V]
Process = Callable[[Array, Array, Array], Array]


class Settings(NamedTuple):
    """How the distribution is bent before the draw, one value for each row."""

    temperature: Float[Array, " R"]
    top_k: Int[Array, " R"]
    top_p: Float[Array, " R"]
    min_p: Float[Array, " R"]


def choose(
    logits: Float[Array, "R V"],
    tokens: Int[Array, "R T"],
    columns: Int[Array, " R"],
    *,
    keys: Array,
    settings: Settings,
    process: tuple[Process, ...] = (),
) -> tuple[Int[Array, " R"], Float[Array, " R"]]:
    """Chooses the token of each row at its column.

    Args:
      logits: the model's, for that column.
      tokens: the rows so far, 0 from that column on.
      columns: the column to be filled.
      keys: one key for each row.
      settings: of each row.
      process: functions that change the logits before the temperature, applied in order.

    Returns:
      the token, and its log-probability under the model's own logits at the temperature alone: what a trainer computes
      again. Filters and processes change which token is drawn, never this number. Greedy rows report it at 1.
    """
    greedy = settings.temperature == 0
    temperature = jnp.where(greedy, 1.0, settings.temperature)
    gap = allowed = transforms.gaps(logits, temperature)
    if process:
        for function in process:
            logits = function(logits, tokens, columns)
        allowed = transforms.gaps(logits, temperature)
    limit = transforms.gap_limit(allowed, top_k=settings.top_k, top_p=settings.top_p, min_p=settings.min_p)
    # greedy is the draw among the best at uniform = 0, which is the first of them
    limit = jnp.where(greedy, 0.0, limit)
    uniform = jnp.where(greedy[:, None], 0.0, draw.uniforms(keys, columns))
    token = draw.categorical(allowed, limit, uniform)
    logp = -jnp.take_along_axis(gap, token[:, None], axis=-1)[:, 0] - jnp.log(jnp.sum(jnp.exp(-gap), axis=-1))
    return token, logp
