"""Losses of a critic over tokens: `loss(values, old_values, returns, mask, *, ...) -> [B, T]`."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.types import Array, Scalar


def value_clip(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Array,
    *,
    clip: Scalar | None = 0.2,
) -> Float[Array, "B T"]:
    """Value loss, clipped: max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2.

    A value that has moved away from the old one by more than eps, towards the return, learns no further from these
    rows. PPO's own code brought the clip; see "Implementation Matters in Deep Policy Gradients: A Case Study on PPO and
    TRPO", Engstrom et al. (https://arxiv.org/abs/2005.12729). The clip is 0.2 in TRL, 0.5 in verl and OpenRLHF. Where a
    critic is to predict the final score from every partial answer, `returns` is that score on every token.

    Args:
      values: `[B, T]` of the critic that is trained.
      old_values: `[B, T]` of the critic before it learned from these rows, a constant.
      returns: `[B, T]`, what the values should be, a constant.
      mask: `[B, T]`, the tokens whose values are learned.
      clip: eps, in units of the returns; None for plain (V - R)^2 / 2.

    Raises:
      ValueError: for a clip known to be 0 or less.
    """
    if clip is not None:
        check_positive("value_clip", clip=clip)
    arrays = (values, old_values, returns)
    chex.assert_rank([*arrays, mask], 2)
    chex.assert_equal_shape([*arrays, mask])
    values, old_values, returns = (jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in arrays)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    loss = (values - returns) ** 2
    if clip is not None:
        clipped = jnp.clip(values, old_values - clip, old_values + clip)
        loss = jnp.maximum(loss, (clipped - returns) ** 2)
    return loss / 2
