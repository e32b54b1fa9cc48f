"""Advantages of samples from the others of their group: `advantages(rewards [B, G], *, ...) -> [B, G]`.

G samples answer each of B prompts. A reward that is NaN (an answer that could not be scored) takes no part, and its
advantage is 0; so is, exactly, that of every sample of a group whose rewards are equal.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real

from alignax.advantages._spread import centre, check_groups, deviation, divide
from alignax.types import Array, Scalar


def group_relative(rewards: Float[Array, "B G"], *, eps: Scalar = 1e-4, ddof: Scalar = 1) -> Float[Array, "B G"]:
    """GRPO, group-relative: (r - mean) / (std + eps), mean and standard deviation of the prompt's own group.

    See "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", Shao et al.
    (https://arxiv.org/abs/2402.03300), section 4.1.2. The paper leaves eps and ddof open; 1e-4 and 1 are TRL's, 1e-6
    and 1 verl's.

    Args:
      rewards: `[B, G]`, NaN for an answer without one.
      eps: keeps the quotient finite where rewards hardly differ.
      ddof: 1 divides the sum of squares by G - 1, 0 by G.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    check_groups(rewards, "group_relative")
    centred, scored = centre(rewards)
    return jax.lax.stop_gradient(divide(centred, deviation(centred, scored, ddof), eps))


def group_relative_batch(rewards: Float[Array, "B G"], *, eps: Scalar = 1e-4, ddof: Scalar = 1) -> Float[Array, "B G"]:
    """GRPO scaled by the batch: (r - mean of the group) / (std of all rewards + eps).

    Groups of little spread are not blown up. See "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning", Liu
    et al. (https://arxiv.org/abs/2508.08221), Lite PPO. Take it over a whole rollout, before it is split.

    Args:
      rewards: `[B, G]`, NaN for an answer without one.
      eps: keeps the quotient finite where rewards hardly differ.
      ddof: 1 divides the sum of squares by the number of rewards less one, 0 by their number.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    check_groups(rewards, "group_relative_batch")
    spread = deviation(*centre(rewards.reshape(1, -1)), ddof)
    return jax.lax.stop_gradient(divide(centre(rewards)[0], spread, eps))


def group_centred(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """Dr. GRPO: r - mean of the group, not divided, so that hard and easy prompts are not weighed up.

    See "Understanding R1-Zero-Like Training: A Critical Perspective", Liu et al. (https://arxiv.org/abs/2503.20783).

    Args:
      rewards: `[B, G]`, NaN for an answer without one.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    check_groups(rewards, "group_centred")
    return jax.lax.stop_gradient(centre(rewards)[0])


def leave_one_out(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """RLOO, leave one out: r_i - mean of the group's other rewards = G / (G - 1) (r_i - mean).

    The baseline does not depend on the sample, and the gradient stays unbiased. TRL's `normalize_advantages` is
    `alignax.reduce.whiten` of these, but for its eps. See "Back to Basics: Revisiting
    REINFORCE Style Optimization for Learning from Human Feedback in LLMs", Ahmadian et al.
    (https://arxiv.org/abs/2402.14740).

    Args:
      rewards: `[B, G]`, NaN for an answer without one; G is then the number of those that have one. An answer
        without others gets 0.

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    check_groups(rewards, "leave_one_out")
    centred, scored = centre(rewards)
    count = jnp.sum(scored, axis=1, keepdims=True, dtype=jnp.float32)
    return jax.lax.stop_gradient(centred * count / jnp.maximum(count - 1, 1.0))


def opo(rewards: Float[Array, "B G"], lengths: Real[Array, "B G"]) -> Float[Array, "B G"]:
    """OPO, on-policy optimal baseline: r_i - sum_j l_j r_j / sum_j l_j, answers weighed by their lengths.

    The baseline of least variance when the squared gradient of an answer grows with its length. See "On-Policy RL with
    Optimal Reward Baseline", Hao et al. (https://arxiv.org/abs/2505.23585).

    Args:
      rewards: `[B, G]`, NaN for an answer without one.
      lengths: `[B, G]`, tokens of each answer (paper: l).

    Raises:
      ValueError: for groups of one, which have nothing to compare with.
    """
    check_groups(rewards, "opo")
    chex.assert_equal_shape([rewards, lengths])
    centred, scored = centre(rewards)
    weight = jnp.where(scored, jax.lax.stop_gradient(lengths).astype(jnp.float32), 0.0)
    total = jnp.sum(weight, axis=1, keepdims=True)
    # of what is left after the plain mean: equal rewards then have exactly 0 left, whatever the lengths
    baseline = jnp.sum(weight * centred, axis=1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return jax.lax.stop_gradient(jnp.where(scored, centred - baseline, 0.0))


def informative_groups(rewards: Float[Array, "B G"]) -> Bool[Array, " B"]:
    """DAPO's dynamic filter: max r > min r, the groups whose rewards differ and thus teach anything.

    Shapes stay as they are: give the rows of other groups weight 0. The fraction of groups without spread is
    `reduce.batch_mean(1.0 - informative_groups(rewards), weights)`. See "DAPO: An Open-Source LLM Reinforcement
    Learning System at Scale", Yu et al. (https://arxiv.org/abs/2503.14476), eq. 11.

    Args:
      rewards: `[B, G]`, or what else is to differ (an accuracy); NaN for an answer without one.

    Raises:
      ValueError: for groups of one, which cannot differ.
    """
    check_groups(rewards, "informative_groups")
    scored = ~jnp.isnan(rewards)
    largest = jnp.max(jnp.where(scored, rewards, -jnp.inf), axis=1)
    return largest > jnp.min(jnp.where(scored, rewards, jnp.inf), axis=1)
