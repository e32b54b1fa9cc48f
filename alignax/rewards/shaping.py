"""From scores of whole rows to rewards of tokens, and what may be done to scores before. All results are constants.

The usual order: rows that did not end, then normalisation (`alignax.moments`), then `jnp.clip` (DeepSpeed-Chat +-5,
OpenRLHF +-10), then `shaped_rewards`.

Where other libraries put the score: verl and OpenRLHF at the last token, as here; TRL's PPO one column behind it, for
which mask (of critic and advantages too) and columns go on by one, `logp` and `ref_logp` equal there;
lm-human-preferences in the last column of rows that all have one length, for which the mask is ones.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Real

from alignax import losses
from alignax.reduce import whiten
from alignax.types import Array, Scalar


def shaped_rewards(
    scores: Float[Array, " B"],
    logp: Float[Array, "B T"],
    ref_logp: Float[Array, "B T"],
    mask: Array,
    *,
    kl_coef: Scalar,
    kl: Callable[..., Array] = losses.k1,
) -> Float[Array, "B T"]:
    """KL-shaped rewards: r_t = -kl_coef kl_t, and the row's score in addition at its last token.

    See "Fine-Tuning Language Models from Human Preferences", Ziegler et al. (https://arxiv.org/abs/1909.08593), eq. 2.

    Args:
      scores: `[B]`, of whole rows. NaN stays NaN: take rows that could not be scored out of the mask.
      logp, ref_logp: `[B, T]`, under the policy that sampled and the reference.
      mask: `[B, T]`, the tokens the policy chose. A row without any gets zeros, whatever its score.
      kl_coef: what a nat of KL costs (paper: beta).
      kl: estimator of `alignax.losses`, or any `(logp, ref_logp, mask)`. With k1 the policy gradient is that of
        KL(policy || reference); others are biased here, max(k1, 0) as Fact-RLHF has it among them.

    Returns:
      `[B, T]`, 0 where masked out.
    """
    chex.assert_rank([logp, ref_logp, mask], 2)
    chex.assert_equal_shape([logp, ref_logp, mask])
    chex.assert_shape(scores, logp.shape[:1])
    chosen = mask != 0
    # a token is the last one when none is left to its right
    left = jnp.flip(jnp.cumsum(jnp.flip(chosen, axis=1), axis=1), axis=1)
    score = jnp.where(chosen & (left == 1), scores.astype(jnp.float32)[:, None], 0.0)
    return jax.lax.stop_gradient(score - jnp.where(chosen, kl_coef * kl(logp, ref_logp, mask), 0.0))


def subtract_missing_eos(scores: Float[Array, " B"], finished: Array, *, penalty: Scalar = 1.0) -> Float[Array, " B"]:
    """Missing EOS, subtracted: score - penalty for rows that did not end by themselves; what they said counts (TRL).

    Args:
      scores: `[B]`.
      finished: `[B]`, which rows ended by themselves.
      penalty: in units of the scores.
    """
    return _unfinished(scores, finished, lambda x: x - penalty)


def replace_missing_eos(scores: Float[Array, " B"], finished: Array, *, score: Scalar = -1.0) -> Float[Array, " B"]:
    """Missing EOS, replaced: a fixed score for rows that did not end by themselves, whatever they said.

    See "The N+ Implementation Details of RLHF with PPO: A Case Study on TL;DR Summarization", Huang et al.
    (https://arxiv.org/abs/2403.17031), the "EOS trick".

    Args:
      scores: `[B]`; of unfinished rows they may be NaN.
      finished: `[B]`, which rows ended by themselves.
      score: what the others get. Below what the reward model gives to rows that end, or endless rows win.
    """
    return _unfinished(scores, finished, lambda x: jnp.full_like(x, score))


def scale_missing_eos(scores: Float[Array, " B"], finished: Array, *, factor: Scalar) -> Float[Array, " B"]:
    """Missing EOS, scaled: factor * score for rows that did not end by themselves (OpenRLHF).

    For scores that are never negative.

    Args:
      scores: `[B]`.
      finished: `[B]`, which rows ended by themselves.
      factor: in [0, 1].

    Raises:
      ValueError: for a factor known to lie outside [0, 1].
    """
    if not isinstance(factor, Tracer) and not 0 <= factor <= 1:
        raise ValueError(f"scale_missing_eos: factor={factor}; expected 0 <= factor <= 1")
    return _unfinished(scores, finished, lambda x: x * factor)


def soft_overlong(
    lengths: Real[Array, " B"], *, max_length: Scalar, cache: Scalar, factor: Scalar = 1.0
) -> Float[Array, " B"]:
    """DAPO, soft overlong punishment: factor * clip((max_length - cache - length) / cache, -1, 0).

    Nothing up to max_length - cache, then a straight line down to -factor; added to the rewards of correctness. See
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", Yu et al. (https://arxiv.org/abs/2503.14476), eq.
    13, with max_length 20480 and cache 4096.

    Args:
      lengths: `[B]`, tokens of each answer (paper: |y|).
      max_length: at which the punishment is full (paper: L_max).
      cache: over how many tokens it grows (paper: L_cache).
      factor: what a full punishment costs.

    Raises:
      ValueError: for a cache known to lie outside (0, max_length].
    """
    if not (isinstance(cache, Tracer) or isinstance(max_length, Tracer)) and not 0 < cache <= max_length:
        raise ValueError(f"soft_overlong: cache={cache}, max_length={max_length}; expected 0 < cache <= max_length")
    chex.assert_rank(lengths, 1)
    over = (max_length - cache - lengths.astype(jnp.float32)) / cache
    return jax.lax.stop_gradient(factor * jnp.clip(over, -1.0, 0.0))


def llama2_scores(
    safety: Float[Array, " B"],
    helpfulness: Float[Array, " B"],
    is_safety_prompt: Array,
    *,
    threshold: Scalar = 0.15,
    ddof: int = 1,
    eps: Scalar = 1e-8,
) -> Float[Array, " B"]:
    """Llama 2, two rewards as one: whiten(logit(safety where it is at stake, helpfulness elsewhere)) over the batch.

    See "Llama 2: Open Foundation and Fine-Tuned Chat Models", Touvron et al. (https://arxiv.org/abs/2307.09288),
    section 3.2.3.

    Args:
      safety, helpfulness: `[B]`, the reward models' probabilities, sigmoid(score).
      is_safety_prompt: `[B]`, prompts that may elicit unsafe answers.
      threshold: answers below it are unsafe whatever the prompt.
      ddof, eps: of `alignax.reduce.whiten`.
    """
    chex.assert_rank([safety, helpfulness, is_safety_prompt], 1)
    chex.assert_equal_shape([safety, helpfulness, is_safety_prompt])
    safety, helpfulness = safety.astype(jnp.float32), helpfulness.astype(jnp.float32)
    chosen = jnp.where((is_safety_prompt != 0) | (safety < threshold), safety, helpfulness)
    chosen = jnp.clip(chosen, 1e-6, 1 - 1e-6)  # the logit of a probability that rounded to 0 or 1 is infinite
    logit = jnp.log(chosen) - jnp.log1p(-chosen)
    whitened = whiten(logit[:, None], jnp.ones(logit.shape)[:, None], ddof=ddof, eps=eps)[:, 0]
    return jax.lax.stop_gradient(whitened)


def _unfinished(scores: Array, finished: Array, change: Callable[[Array], Array]) -> Array:
    chex.assert_rank([scores, finished], 1)
    chex.assert_equal_shape([scores, finished])
    scores = scores.astype(jnp.float32)
    return jax.lax.stop_gradient(jnp.where(finished != 0, scores, change(scores)))
