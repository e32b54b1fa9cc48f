"""P3O, pairwise PPO: `loss(first, second, *, ...) -> [B]` of two samples of one prompt and their rewards.

Only the difference of the rewards counts, so that adding a constant to both rewards of a prompt changes nothing, where
PPO would need a critic to take it off. Of each side, x = sum_t(logp - ref_logp) now and x_old when it was sampled;

    q = sg(r_1 - r_2 - kl_weight (x_1 - x_2)) / scale,    p = sg(clip(exp(x_1 - x_1_old + x_2 - x_2_old), 1 / c, c)).

See "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment", Wu et al.
(https://arxiv.org/abs/2310.00212); what the paper leaves open is as in its first author's code.
Both sides need `extra["old_logp"]` `[B, T]`, log-probabilities when they were sampled, and `extra["reward"]` `[B]`.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check, check_positive
from alignax.losses._sides import check_sides, log_ratio
from alignax.losses.extras import extra, needs
from alignax.types import LEAST_LOGP, Array, Response, Scalar


@needs("old_logp", "reward")
def p3o_joint(
    first: Response,
    second: Response,
    *,
    kl_weight: Scalar = 0.1,
    clip: Scalar = 0.2,
    ratio_clip: Scalar = 10.0,
    scale: Scalar = 1.0,
) -> Float[Array, " B"]:
    """P3O, joint clipping: max(-q p D, -q p clip(D, D_old - clip, D_old + clip)) / 2, D = x_1 - x_2.

    q is the gap of the rewards, p the weight of an old pair: see the top of this module. See "Pairwise Proximal Policy
    Optimization: Harnessing Relative Feedback for LLM Alignment", Wu et al. (https://arxiv.org/abs/2310.00212), its
    second variant. Twice its sum over a batch, over the number of tokens of all samples, is the author's
    `avg_tokenwise`.

    Args:
      first, second: the two samples.
      kl_weight: how strongly the reference holds (paper: beta).
      clip: how far D counts beyond its value when it was sampled (paper: epsilon).
      ratio_clip: c >= 1, the largest weight of a pair that has become more likely.
      scale: q is divided by it: 1, or the standard deviation of `p3o_gap` over the whole batch.

    Raises:
      ValueError: for a ratio_clip known to be below 1, a scale known to be 0 or less, or a side without an extra.
    """
    weight = _gap_times_ratio(first, second, kl_weight, ratio_clip, scale, "p3o_joint")
    difference = log_ratio(first) - log_ratio(second)
    old = jax.lax.stop_gradient(log_ratio(_old(first, "p3o_joint")) - log_ratio(_old(second, "p3o_joint")))
    clipped = jnp.clip(difference, old - clip, old + clip)
    return jnp.maximum(-weight * difference, -weight * clipped) / 2


@needs("old_logp", "reward")
def p3o_separate(
    first: Response,
    second: Response,
    *,
    kl_weight: Scalar = 0.1,
    clip: Scalar = 0.2,
    ratio_clip: Scalar = 10.0,
    scale: Scalar = 1.0,
    tokens: Scalar | None = None,
) -> Float[Array, " B"]:
    """P3O, separate clipping: sum_t(max(w l_1, w clip(l_1)) + max(-w l_2, -w clip(l_2))) / tokens, w = -q p, l = logp.

    clip(l) lies within `clip` of the token's log-probability when it was sampled. See "Pairwise Proximal Policy
    Optimization: Harnessing Relative Feedback for LLM Alignment", Wu et al. (https://arxiv.org/abs/2310.00212), its
    first variant, by tokens as in the author's code, where the paper clips the ratio of a response.

    Args:
      first, second, kl_weight, ratio_clip, scale: as for `p3o_joint`.
      clip: how far a token's log-probability counts beyond the old one (paper: epsilon).
      tokens: the tokens of a pair, both sides together, on average over the whole batch: its mean over pairs is then
        the sum over all tokens divided by their number. None: those of each pair itself.

    Raises:
      ValueError: for a ratio_clip known to be below 1, a scale known to be 0 or less, or a side without an extra.
    """
    weight = -_gap_times_ratio(first, second, kl_weight, ratio_clip, scale, "p3o_separate")

    def worst(side: Response, weight: Array) -> Array:
        """sum_t max(w l, w clip(l)) / w."""
        old = extra(side, "old_logp", "p3o_separate")
        logp, old = (
            jnp.maximum(jnp.where(side.mask != 0, x.astype(jnp.float32), 0.0), LEAST_LOGP) for x in (side.logp, old)
        )
        old = jax.lax.stop_gradient(old)
        near = jnp.clip(logp, old - clip, old + clip)
        chosen = jnp.where(weight[:, None] >= 0, jnp.maximum(logp, near), jnp.minimum(logp, near))
        return jnp.sum(jnp.where(side.mask != 0, chosen, 0.0), axis=1)

    tokens = first.length + second.length if tokens is None else jnp.asarray(tokens, jnp.float32)
    return weight * (worst(first, weight) - worst(second, -weight)) / jnp.maximum(tokens, 1.0)


@needs("reward")
def p3o_gap(first: Response, second: Response, *, kl_weight: Scalar = 0.1) -> Float[Array, " B"]:
    """P3O's reward gap: q = sg(r_1 - r_2 - kl_weight (x_1 - x_2)).

    0 where the policy is as far from the reference as the rewards ask for. Its standard deviation over a whole batch
    may be the `scale` of the losses. See "Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM
    Alignment", Wu et al. (https://arxiv.org/abs/2310.00212).

    Args:
      first, second: the two samples; only `extra["reward"]` is read.
      kl_weight: how strongly the reference holds (paper: beta).
    """
    check_sides(first, second)
    rewards = [extra(side, "reward", "p3o_gap").astype(jnp.float32) for side in (first, second)]
    chex.assert_shape(rewards, first.logp.shape[:1])
    return jax.lax.stop_gradient(rewards[0] - rewards[1] - kl_weight * (log_ratio(first) - log_ratio(second)))


def _old(side: Response, loss: str) -> Response:
    return side._replace(logp=extra(side, "old_logp", loss))


def _gap_times_ratio(
    first: Response, second: Response, kl_weight: Scalar, ratio_clip: Scalar, scale: Scalar, loss: str
) -> Float[Array, " B"]:
    """q p, a constant."""
    check(loss, "ratio_clip", ratio_clip, lambda c: c >= 1, "ratio_clip >= 1")
    check_positive(loss, scale=scale)
    moved = sum(log_ratio(side) - log_ratio(_old(side, loss)) for side in (first, second))
    ratio = jnp.clip(jnp.exp(jnp.clip(moved, -20.0, 20.0)), 1 / ratio_clip, ratio_clip)
    return jax.lax.stop_gradient(ratio * p3o_gap(first, second, kl_weight=kl_weight) / scale)
