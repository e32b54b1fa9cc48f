"""What every algorithm that reuses samples says about how far its policy has moved."""

import jax
import jax.numpy as jnp

from alignax import losses, reduce
from alignax.types import Max, Mean


def policy_metrics(policy_loss, logp, old_logp, advantages, mask, weights, hyper) -> dict[str, Mean | Max]:
    """How far the policy moved from the one that sampled, whatever the policy loss."""
    logp = jax.lax.stop_gradient(logp)
    _, pull = jax.vjp(lambda x: policy_loss(x, old_logp, advantages, mask, **hyper), logp)
    gradient = pull(jnp.ones_like(logp))[0]
    ratio = jnp.exp(jnp.clip(jnp.where(mask != 0, logp - old_logp, 0.0), -20.0, 20.0))  # as in the losses
    clipped = (gradient == 0) & (jnp.where(mask != 0, advantages, 0.0) != 0)
    return {
        "ratio": reduce.token_mean(ratio, mask, weights),
        "ratio/max": Max(jnp.max(jnp.where(mask != 0, ratio, 0.0))),
        "approx_kl": reduce.token_mean(losses.k3(old_logp, logp, mask), mask, weights),
        "clip_fraction": reduce.token_mean(clipped.astype(jnp.float32), mask, weights),
    }
