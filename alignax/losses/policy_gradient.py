"""Policy losses over tokens: `loss(logp, old_logp, advantages, mask, *, ...) -> [B, T]`, to be minimised.

`old_logp` and `advantages` are constants. The log-ratio is clipped to [-20, 20] before the exponential, so that no
token can overflow.
"""

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from alignax.losses.divergence import k3_forward
from alignax.types import Array, Scalar


def ppo_clip(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate: -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - old_logp).

    See "Proximal Policy Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), eq. 7. Ranges of
    different width are DAPO's clip-higher (https://arxiv.org/abs/2503.14476). `dual_clip` bounds the loss of a bad
    token by -dual_clip A, however large its ratio: "Mastering Complex Control in MOBA Games with Deep Reinforcement
    Learning", Ye et al. (https://arxiv.org/abs/1912.09729), eq. 5.

    Args:
      logp: `[B, T]` under the policy that is trained.
      old_logp: `[B, T]` under the policy that sampled, by the trainer's arithmetic.
      advantages: `[B, T]`.
      mask: `[B, T]`, the tokens the policy chose.
      clip_low, clip_high: how far the ratio counts below and above 1 (paper: epsilon).
      dual_clip: c > 1, or None for none (3 is usual).

    Raises:
      ValueError: for a dual_clip known to be 1 or less.
    """
    if dual_clip is not None and not isinstance(dual_clip, Tracer) and dual_clip <= 1:
        raise ValueError(f"ppo_clip: dual_clip={dual_clip}; expected a number above 1, or None for none")
    ratio, advantages = _ratio_and_advantages(logp, old_logp, advantages, mask)
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss


def ppo_penalty(
    logp: Float[Array, "B T"],
    old_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    kl_weight: Scalar = 1.0,
) -> Float[Array, "B T"]:
    """PPO's penalised surrogate: -r A + kl_weight * (r - 1 - log r), r = exp(logp - old_logp).

    The second summand estimates KL(old || new) from samples of the old policy (`k3_forward`; add it to `ppo_clip` to
    have both). See "Proximal Policy Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347),
    eq. 8; `alignax.controllers.ppo_paper_kl` adapts the weight as the paper does.

    Args:
      logp, old_logp, advantages, mask: `[B, T]`, as for `ppo_clip`.
      kl_weight: how strongly the old policy holds (paper: beta).
    """
    ratio, advantages = _ratio_and_advantages(logp, old_logp, advantages, mask)
    return -ratio * advantages + kl_weight * k3_forward(logp, old_logp, mask)


def _ratio_and_advantages(logp: Array, old_logp: Array, advantages: Array, mask: Array) -> tuple[Array, Array]:
    chex.assert_rank([logp, old_logp, advantages, mask], 2)
    chex.assert_equal_shape([logp, old_logp, advantages, mask])
    logp, old_logp, advantages = (
        jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (logp, old_logp, advantages)
    )
    ratio = jnp.exp(jnp.clip(logp - jax.lax.stop_gradient(old_logp), -20.0, 20.0))
    return ratio, jax.lax.stop_gradient(advantages)
