"""Rules that move a coefficient between updates: `(coefficient, measurement, *, ...) -> coefficient`.

Coefficients are traced hyperparameters of the losses, so that moving one compiles nothing. The rules take Python
numbers and arrays and return a float32 array. A measurement that is NaN changes nothing.
"""

import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check_positive
from alignax.types import Array, Scalar


def adaptive_kl(
    kl_coef: Scalar,
    kl: Scalar,
    *,
    count: Scalar,
    target: Scalar = 6.0,
    horizon: Scalar = 10000.0,
    low: Scalar = 0.0,
    high: Scalar = 1e6,
) -> Float[Array, ""]:
    """Adaptive KL, proportional: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) count / horizon).

    See "Fine-Tuning Language Models from Human Preferences", Ziegler et al. (https://arxiv.org/abs/1909.08593),
    section 2.2; the defaults are those of its code, which starts from 0.15 to 0.2.

    Args:
      kl_coef: what a nat of KL costs (paper: beta).
      kl: the KL that was measured, nats summed over a row, averaged over rows; k1 may make it negative.
      count: how many rows were sampled since the last change.
      target: the KL to keep to, in the same unit.
      horizon: after about this many rows a KL off by 20 % or more changes the coefficient by 20 %.
      low, high: the coefficient stays between them.

    Raises:
      ValueError: for a target or a horizon known to be 0 or less.
    """
    check_positive("adaptive_kl", target=target, horizon=horizon)
    error = jnp.nan_to_num(jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1, -0.2, 0.2))
    return jnp.clip(kl_coef * (1 + error * count / horizon), low, high)


def ppo_paper_kl(
    kl_coef: Scalar, kl: Scalar, *, target: Scalar = 0.01, low: Scalar = 0.0, high: Scalar = 1e6
) -> Float[Array, ""]:
    """Adaptive KL, the PPO paper's: kl_coef / 2 where kl < target / 1.5, 2 kl_coef where kl > 1.5 target, else kl_coef.

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
    """Adaptive entropy: coef + step where entropy <= target, coef - step where entropy > target, in [low, high].

    See "Skywork Open Reasoner 1 Technical Report", He et al. (https://arxiv.org/abs/2505.22312), section 4. There the
    bonus applies only while the entropy is at most the target; multiply by `entropy <= target` for that.

    Args:
      coef: the weight of the entropy bonus (paper: alpha).
      entropy: that was measured, nats per token.
      target: the least entropy wanted, in the same unit (paper: tgt-ent).
      step: by how much the coefficient moves (paper: Delta).
      low, high: the coefficient stays between them.
    """
    entropy = jnp.asarray(entropy, jnp.float32)
    change = jnp.where(entropy <= target, step, jnp.where(entropy > target, -step, 0.0))
    return jnp.clip(coef + change, low, high)
