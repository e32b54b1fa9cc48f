"""What every algorithm that reuses samples shares: how far its policy has moved, and what to do about it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from alignax import corrections, losses, reduce
from alignax.types import Array, Max, Mean, Scalar


def policy_metrics(policy_loss, logp, old_logp, advantages, mask, weights, hyper) -> dict[str, Mean | Max]:
    """How far the policy moved from the one that sampled, whatever the policy loss."""
    logp = jax.lax.stop_gradient(logp)
    _, pull = jax.vjp(lambda x: policy_loss(x, old_logp, advantages, mask, **hyper), logp)
    gradient = pull(jnp.ones_like(logp))[0]
    ratio = losses.importance_ratio(logp, old_logp, mask)
    clipped = (gradient == 0) & (jnp.where(mask != 0, advantages, 0.0) != 0)
    return {
        "ratio": reduce.token_mean(ratio, mask, weights),
        "ratio/max": Max(jnp.max(ratio)),
        "approx_kl": reduce.token_mean(losses.k3(old_logp, logp, mask), mask, weights),
        "clip_fraction": reduce.token_mean(clipped.astype(jnp.float32), mask, weights),
    }


def off_policy_weights(
    logp: Array,
    old_logp: Array,
    advantages: Array,
    mask: Array,
    rollout_logp: Array | None,
    weights: Array | None,
    hyper: dict[str, Scalar],
    *,
    correction: Callable[..., Array] | None,
    threshold: Scalar | None,
) -> tuple[Array | None, dict[str, Mean | Max]]:
    """Factors `[B, T]` of the policy loss, None for none, and metrics of what makes them necessary.

    Raises:
      ValueError: for a correction of rows whose sampler said nothing.
    """
    if correction is not None and rollout_logp is None:
        raise ValueError(f"the batch has no rollout_logp; expected one for the correction {_name(correction)}")
    factors, metrics = None, {}
    if rollout_logp is not None:
        found = corrections.mismatch_metrics(old_logp, rollout_logp, mask, weights)
        metrics |= {f"sampling/{name}": value for name, value in found.items()}
    if correction is not None:
        factors = correction(old_logp, rollout_logp, mask, **hyper)
    if threshold is not None:
        sampled = old_logp if rollout_logp is None else rollout_logp
        kept = corrections.off_policy_mask(logp, sampled, advantages, mask, threshold=threshold)
        metrics["sampling/kept_rows"] = reduce.batch_mean(kept, weights)
        kept = jnp.broadcast_to(kept[:, None], mask.shape)
        factors = kept if factors is None else factors * kept
    return factors, metrics


def split_prefixed(hyper: dict[str, Scalar], prefix: str) -> tuple[dict[str, Scalar], dict[str, Scalar]]:
    """The hyperparameters without the prefix, and those with it, by their own names."""
    prefixed = {name.removeprefix(prefix): value for name, value in hyper.items() if name.startswith(prefix)}
    return {name: value for name, value in hyper.items() if not name.startswith(prefix)}, prefixed


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
