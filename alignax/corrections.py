"""Off-policy corrections: weights for samples that another policy drew than the one `old_logp` speaks of.

A sampler computes log-probabilities by other arithmetic than the trainer, and an asynchronous one with older weights.
Each token then stands for more or fewer than one of the trainer's: r = exp(old_logp - rollout_logp) of them, a whole
response for prod_t r_t. Weights are constants `[B, T]`, 0 where masked out, that multiply a policy loss per token
before it is reduced; KL and entropy terms stay as they are.

    weights = corrections.truncated_is_token(old_logp, rollout_logp, mask)
    loss = weights * losses.ppo_clip(logp, old_logp, advantages, mask)

is decoupled PPO (https://arxiv.org/abs/2110.00641): clipped around the trainer's policy before the update, weighted for
the one that sampled. Weights multiply: `geometric_rejection(...) * truncated_is_token(...)` is verl's masked variant.
Do not weigh where `old_logp` already is the sampler's: its ratio would count twice.
"""

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float

from alignax import reduce
from alignax.losses._checks import check_positive
from alignax.losses._ratios import exp, row_mean
from alignax.types import LEAST_LOGP, Array, Max, Mean, Scalar


def token_ratio(old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Token ratio: r_t = exp(old_logp - rollout_logp), its logarithm clipped to [-20, 20].

    See "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al.
    (https://fengyao.notion.site/off-policy-rl).

    Args:
      old_logp: `[B, T]`, of the trainer before it learns from these rows.
      rollout_logp: `[B, T]`, as the sampler reported them.
      mask: `[B, T]`, the tokens the policy chose.
    """
    return _ratio(_log_ratio(old_logp, rollout_logp, mask), mask)


def sequence_ratio(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array
) -> Float[Array, "B T"]:
    """Sequence ratio: prod_t r_t on each token of the row, its logarithm clipped to [-20, 20].

    The only unbiased one; it runs to 0 or to its cap as rows grow longer. See "When Speed Kills Stability: Demystifying
    RL Collapse from the Training-Inference Mismatch", Liu et al. (https://richardli.xyz/rl-collapse).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
    """
    return _ratio(jnp.sum(_log_ratio(old_logp, rollout_logp, mask), axis=1, keepdims=True), mask)


def geometric_ratio(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array
) -> Float[Array, "B T"]:
    """Geometric ratio: (prod_t r_t)^(1 / length) on each token of the row, which length does not carry away.

    See "Group Sequence Policy Optimization", Zheng et al. (https://arxiv.org/abs/2507.18071), eq. 7.

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
    """
    return _ratio(row_mean(_log_ratio(old_logp, rollout_logp, mask), mask), mask)


def truncated_is_token(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array, *, cap: Scalar = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance sampling, tokens: min(r_t, cap).

    See "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", Yao et al.
    (https://fengyao.notion.site/off-policy-rl).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      cap: the largest weight (paper: C), 1.5 to 5.
    """
    check_positive("truncated_is_token", cap=cap)
    return jnp.minimum(token_ratio(old_logp, rollout_logp, mask), cap)


def truncated_is_sequence(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array, *, cap: Scalar = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance sampling, sequences: min(prod_t r_t, cap) on each token of the row.

    See "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", Liu et al.
    (https://richardli.xyz/rl-collapse).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      cap: the largest weight, 2 to 10.
    """
    check_positive("truncated_is_sequence", cap=cap)
    return jnp.minimum(sequence_ratio(old_logp, rollout_logp, mask), cap)


def truncated_is_geometric(
    old_logp: Float[Array, "B T"], rollout_logp: Float[Array, "B T"], mask: Array, *, cap: Scalar = 2.0
) -> Float[Array, "B T"]:
    """Truncated importance sampling, geometric: min((prod_t r_t)^(1 / length), cap) on each token of the row.

    See "Group Sequence Policy Optimization", Zheng et al. (https://arxiv.org/abs/2507.18071), eq. 7, for the ratio.

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      cap: the largest weight.
    """
    check_positive("truncated_is_geometric", cap=cap)
    return jnp.minimum(geometric_ratio(old_logp, rollout_logp, mask), cap)


def masked_is_token(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Array,
    *,
    low: Scalar = 0.0,
    high: Scalar = 3.0,
) -> Float[Array, "B T"]:
    """Masked importance sampling, tokens: r_t where low <= r_t <= high, else 0.

    A token on which the policies differ too much teaches nothing, where a cap would still let it. See "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training", Yao et al. (https://fengyao.notion.site/off-policy-rl).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      low, high: the ratios that are kept; the defaults are TRL's.
    """
    return _within("masked_is_token", token_ratio(old_logp, rollout_logp, mask), low, high)


def masked_is_sequence(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Array,
    *,
    low: Scalar = 0.0,
    high: Scalar = 3.0,
) -> Float[Array, "B T"]:
    """Masked importance sampling, sequences: p = prod_t r_t on each token of the row where low <= p <= high, else 0.

    TRL's default. See "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference Mismatch", Liu
    et al. (https://richardli.xyz/rl-collapse).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      low, high: the ratios that are kept; the defaults are TRL's.
    """
    return _within("masked_is_sequence", sequence_ratio(old_logp, rollout_logp, mask), low, high)


def icepop(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Array,
    *,
    low: Scalar = 0.5,
    high: Scalar = 5.0,
) -> Float[Array, "B T"]:
    """IcePop: r_t where low <= r_t <= high, else 0; `masked_is_token` with a floor as well.

    See "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model", Ling Team
    (https://arxiv.org/abs/2510.18855).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      low, high: the ratios that are kept (paper: alpha, beta).
    """
    return _within("icepop", token_ratio(old_logp, rollout_logp, mask), low, high)


def geometric_rejection(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Array,
    *,
    low: Scalar = 0.999,
    high: Scalar = 1.001,
) -> Float[Array, "B T"]:
    """Geometric rejection: 1 on a row whose geometric ratio g has low <= g <= high, else 0.

    Bounds this tight keep the rows whose average token moved by a thousandth. See "When Speed Kills Stability:
    Demystifying RL Collapse from the Training-Inference Mismatch", Liu et al. (https://richardli.xyz/rl-collapse).

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      low, high: the ratios that are kept.
    """
    kept = _within("geometric_rejection", geometric_ratio(old_logp, rollout_logp, mask), low, high)
    return (kept > 0).astype(jnp.float32)


def normalised(weights: Float[Array, "B T"], mask: Array, *, mean: Scalar | None = None) -> Float[Array, "B T"]:
    """Normalised weights: w / mean(w), so that a correction does not change the size of a step (verl's option).

    Args:
      weights: `[B, T]`, of one of the functions above.
      mask: `[B, T]`, the tokens they are for.
      mean: `alignax.reduce.token_mean(weights, mask)` over the whole batch; None: over these rows. 0 leaves all at 0.
    """
    chex.assert_rank([weights, mask], 2)
    chex.assert_equal_shape([weights, mask])
    weights = jax.lax.stop_gradient(jnp.where(mask != 0, weights.astype(jnp.float32), 0.0))
    mean = reduce.token_mean(weights, mask).value() if mean is None else jnp.asarray(mean, jnp.float32)
    return jnp.where(mean > 0, weights / jnp.where(mean > 0, mean, 1.0), 0.0)


def off_policy_mask(
    logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Array,
    *,
    threshold: Scalar,
) -> Float[Array, " B"]:
    """Off-policy sequence mask: 0 where A < 0 and mean_t(rollout_logp - logp) > threshold, else 1.

    A bad response that the policy would hardly give any more has nothing left to teach, and its gradient is the one
    that breaks things; good ones are kept. See "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models",
    DeepSeek-AI (https://arxiv.org/abs/2512.02556), section 3.1.

    Args:
      logp: `[B, T]`, of the policy that is trained, now.
      rollout_logp: `[B, T]`, as the sampler reported them (or `old_logp`).
      advantages: `[B, T]`; a row's is the mean over its tokens.
      mask: `[B, T]`, the tokens the policy chose.
      threshold: the largest average log-ratio of a bad response (paper: delta).
    """
    chex.assert_rank([advantages, mask], 2)
    chex.assert_equal_shape([advantages, mask])
    advantage = row_mean(jnp.where(mask != 0, advantages.astype(jnp.float32), 0.0), mask)
    gone = row_mean(-_log_ratio(logp, rollout_logp, mask), mask) > threshold
    return jax.lax.stop_gradient(1.0 - ((advantage < 0) & gone).astype(jnp.float32))[:, 0]


def mismatch_metrics(
    old_logp: Float[Array, "B T"],
    rollout_logp: Float[Array, "B T"],
    mask: Array,
    weights: Array | None = None,
    *,
    cap: Scalar = 2.0,
) -> dict[str, Mean | Max]:
    """Mismatch metrics: how far trainer and sampler are apart on the sampled tokens, in parts that add up.

    Args:
      old_logp, rollout_logp, mask: `[B, T]`, as for `token_ratio`.
      weights: `[B]`, example weights; a filler row weighs 0.
      cap: of the fraction that lies above it.

    Returns:
      Over tokens: `kl` (rollout_logp - old_logp, samples of the sampler's KL to the trainer), `k3` (the same, never
      negative), `logp_diff_mean` and `logp_diff_max` (absolute), `is_ratio_mean`, `is_ratio_square` (the two that `ess`
      takes), `is_ratio_max`, `is_ratio_above_cap`, `chi2_token` (r^2 - 1). Over rows: `chi2_sequence`,
      `train_perplexity`, `rollout_perplexity`, `perplexity_ratio`.
    """
    log_ratio = _log_ratio(old_logp, rollout_logp, mask)
    ratio, sequence = (_ratio(x, mask) for x in (log_ratio, jnp.sum(log_ratio, axis=1, keepdims=True)))
    clipped = jnp.clip(log_ratio, -20.0, 20.0)
    tokens = {
        "kl": -log_ratio,
        "k3": jnp.expm1(clipped) - clipped,
        "logp_diff_mean": jnp.abs(log_ratio),
        "is_ratio_mean": ratio,
        "is_ratio_square": ratio**2,
        "is_ratio_above_cap": (ratio > cap).astype(jnp.float32),
        "chi2_token": ratio**2 - 1,
    }
    chosen = mask != 0
    surprise = [
        row_mean(-jnp.maximum(jnp.where(chosen, x.astype(jnp.float32), 0.0), LEAST_LOGP), mask)
        for x in (old_logp, rollout_logp)
    ]
    rows = {
        "chi2_sequence": sequence**2 - 1,
        "train_perplexity": _ratio(surprise[0], mask),
        "rollout_perplexity": _ratio(surprise[1], mask),
        "perplexity_ratio": _ratio(surprise[0] - surprise[1], mask),
    }
    counted = chosen if weights is None else chosen & (weights != 0)[:, None]
    found: dict[str, Mean | Max] = {name: reduce.token_mean(x, mask, weights) for name, x in tokens.items()}
    found |= {name: reduce.sequence_mean(x, mask, weights) for name, x in rows.items()}
    largest = {"logp_diff_max": jnp.abs(log_ratio), "is_ratio_max": ratio}
    return found | {name: Max(jnp.max(jnp.where(counted, x, 0.0))) for name, x in largest.items()}


def ess(mean: Scalar, mean_square: Scalar) -> Array:
    """Effective sample size: (E w)^2 / E w^2, the fraction of the samples that equal weights would need; 0 for none.

    See "Metropolized independent sampling with comparisons to rejection sampling and importance sampling", Liu
    (https://doi.org/10.1007/BF00162521).

    Args:
      mean, mean_square: of the weights and of their squares, `is_ratio_mean` and `is_ratio_square` of
        `mismatch_metrics` after they were summed over micro-batches and devices.
    """
    mean_square = jnp.asarray(mean_square, jnp.float32)
    safe = jnp.where(mean_square > 0, mean_square, 1.0)
    return jnp.where(mean_square > 0, jnp.asarray(mean, jnp.float32) ** 2 / safe, 0.0)


def _log_ratio(old_logp: Array, rollout_logp: Array, mask: Array) -> Float[Array, "B T"]:
    """A constant, 0 where masked out."""
    chex.assert_rank([old_logp, rollout_logp, mask], 2)
    chex.assert_equal_shape([old_logp, rollout_logp, mask])
    old_logp, rollout_logp = (
        jnp.maximum(jnp.where(mask != 0, x.astype(jnp.float32), 0.0), LEAST_LOGP) for x in (old_logp, rollout_logp)
    )
    return jax.lax.stop_gradient(old_logp - rollout_logp)


def _ratio(log_ratio: Array, mask: Array) -> Float[Array, "B T"]:
    """e^x on the masked-in tokens, x `[B, T]` or `[B, 1]`."""
    return jnp.where(mask != 0, exp(log_ratio), 0.0)


def _within(name: str, ratio: Array, low: Scalar, high: Scalar) -> Array:
    if not isinstance(low, Tracer) and not isinstance(high, Tracer) and not low < high:
        raise ValueError(f"{name}: low={low}, high={high}; expected low < high, a range around 1 of ratios to keep")
    return jnp.where((low <= ratio) & (ratio <= high), ratio, 0.0)
