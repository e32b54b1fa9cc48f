"""What pairwise losses read from their two sides."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses.f_divergence import f_reverse_kl
from alignax.types import LEAST_LOGP, Array, Response

Divergence = Callable[[Array], Array]


def check_sides(*responses: Response) -> None:
    """Refuses arrays that are not the same `[B, T]` on one side, or sides of different B."""
    for response in responses:
        arrays = [x for x in (response.logp, response.ref_logp, response.mask) if x is not None]
        chex.assert_rank(arrays, 2)
        chex.assert_equal_shape(arrays)
    chex.assert_equal_shape_prefix([response.logp for response in responses], 1)


def check_reference(loss: str, *responses: Response) -> None:
    """Refuses sides without a reference, for losses that read the log-ratio of one side by itself.

    In a margin log pi(y|x) may stand for it; by itself it is far below 0, where such a loss has no gradient left.

    Raises:
      ValueError: naming the loss.
    """
    if any(response.ref_logp is None for response in responses):
        raise ValueError(f"{loss}: ref_logp is None; expected the reference's log-probabilities (0 for none at all)")


def log_ratio(response: Response) -> Float[Array, " B"]:
    """x = log pi(y|x) - log ref(y|x) of whole responses; log pi(y|x) without a reference."""
    check_sides(response)
    if response.ref_logp is None:
        return response.sum
    # Token by token: two sums over thousands of tokens no longer hold the digits of their small difference.
    masked = (jnp.where(response.mask != 0, x.astype(jnp.float32), 0.0) for x in (response.logp, response.ref_logp))
    logp, ref_logp = (jnp.maximum(x, LEAST_LOGP) for x in masked)
    return jnp.sum(logp - jax.lax.stop_gradient(ref_logp), axis=-1)


def log_ratios(
    chosen: Response, rejected: Response, divergence: Divergence = f_reverse_kl
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """x_chosen and x_rejected, each as f'(e^x)."""
    check_sides(chosen, rejected)
    return divergence(log_ratio(chosen)), divergence(log_ratio(rejected))


def average_log_ratio(response: Response) -> Float[Array, " B"]:
    """The log-ratio of an average token; 0 for an empty response."""
    return log_ratio(response) / response.length.clip(1)
