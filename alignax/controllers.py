"""Rules that move a coefficient between updates: `(coefficient, measurement, *, ...) -> coefficient`.

Coefficients are traced hyperparameters of the losses, so that moving one compiles nothing. The rules take Python
numbers and arrays and return a float32 array.
"""

import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import Array, Scalar


def adaptive_kl(
    kl_coef: Scalar,
    kl: Scalar,
    *,
    target: Scalar,
    horizon: Scalar,
    count: Scalar,
    low: Scalar = 0.0,
    high: Scalar = 1e6,
) -> Float[Array, ""]:
    """kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * count / horizon): proportional control of a KL.

    See "Fine-Tuning Language Models from Human Preferences", Ziegler et al. (https://arxiv.org/abs/1909.08593),
    section 2.2.

    Args:
      kl_coef: what a nat of KL costs (paper: beta).
      kl: the KL that was measured, nats summed over a row, averaged over rows; k1 may make it negative.
      target: the KL to keep to, in the same unit.
      horizon: after about this many rows a KL off by 20 % or more changes the coefficient by 20 %.
      count: how many rows were sampled since the last change.
      low, high: the coefficient stays between them.
    """
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -0.2, 0.2)
    return jnp.clip(kl_coef * (1 + error * count / horizon), low, high)


def ppo_paper_kl(
    kl_coef: Scalar, kl: Scalar, *, target: Scalar = 0.01, low: Scalar = 0.0, high: Scalar = 1e6
) -> Float[Array, ""]:
    """Half of kl_coef where kl < target / 1.5, twice of it where kl > 1.5 target, else kl_coef.

    See "Proximal Policy Optimization Algorithms", Schulman et al. (https://arxiv.org/abs/1707.06347), section 4.

    Args:
      kl_coef: the weight of the penalty, `kl_weight` of `alignax.losses.ppo_penalty` (paper: beta).
      kl: KL(old || new) after an update, nats per token (paper: d).
      target: the KL to keep to, in the same unit (paper: d_targ, 0.003 to 0.03).
      low, high: the coefficient stays between them. It cannot leave 0.
    """
    kl = jnp.asarray(kl, jnp.float32)
    factor = jnp.where(kl < target / 1.5, 0.5, jnp.where(kl > target * 1.5, 2.0, 1.0))
    return jnp.clip(kl_coef * factor, low, high)


def adaptive_entropy(
    coef: Scalar,
    entropy: Scalar,
    *,
    target: Scalar = 0.2,
    step: Scalar = 0.005,
    low: Scalar = 0.0,
    high: Scalar = 1.0,
) -> Float[Array, ""]:
    """coef + step where the entropy is at most the target, coef - step where it is above, within [low, high].

    See "Skywork Open Reasoner 1 Technical Report", He et al. (https://arxiv.org/abs/2505.22312), section 4. There the
    bonus applies only while the entropy is at most the target; multiply by `entropy <= target` for that.

    Args:
      coef: the weight of the entropy bonus (paper: alpha).
      entropy: that was measured, nats per token.
      target: the least entropy wanted, in the same unit (paper: tgt-ent).
      step: by how much the coefficient moves (paper: Delta).
      low, high: the coefficient stays between them.
    """
    change = jnp.where(jnp.asarray(entropy, jnp.float32) <= target, step, -step)
    return jnp.clip(coef + change, low, high)
