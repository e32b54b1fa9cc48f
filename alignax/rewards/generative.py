"""Rewards read off a language model: the log-probabilities of a few answer words, as probabilities. Constants.

`logp` of a word is what `alignax.logprobs` gives for it after the question. Train such a model by the cross-entropy of
the right word. See "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", Zhao et al.
(https://arxiv.org/abs/2305.10425), section 2.2.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import LEAST_LOGP, Array, Scalar


def good_score(logp_good: Float[Array, " B"]) -> Float[Array, " B"]:
    """Probability that the answer is called good: p(good), of the whole vocabulary, as published.

    Args:
      logp_good: `[B]`, log-probability of the word for good.
    """
    chex.assert_rank(logp_good, 1)
    return jnp.exp(jax.lax.stop_gradient(logp_good.astype(jnp.float32)))


def good_bad_score(logp_good: Float[Array, " B"], logp_bad: Float[Array, " B"]) -> Float[Array, " B"]:
    """Probability of good rather than bad: p(good) / (p(good) + p(bad)), whatever else the model might have said.

    Its cross-entropy is `alignax.losses.reward_binary` of logp_good - logp_bad.

    Args:
      logp_good, logp_bad: `[B]`, log-probabilities of the two words.
    """
    return jax.nn.sigmoid(_difference(logp_good, logp_bad))


def ab_preference(
    logp_a: Float[Array, " B"],
    logp_b: Float[Array, " B"],
    swapped_logp_a: Float[Array, " B"],
    swapped_logp_b: Float[Array, " B"],
) -> Float[Array, " B"]:
    """Probability that the first answer is preferred, of both orders: (p(A) + 1 - p'(A)) / 2, each out of A and B.

    The letter that stands first is likelier than it should be; the mean of the two orders cancels that.

    Args:
      logp_a, logp_b: `[B]`, of the words "A" and "B" where the first answer is A.
      swapped_logp_a, swapped_logp_b: `[B]`, of the same words where the first answer is B.
    """
    first = jax.nn.sigmoid(_difference(logp_a, logp_b))
    chex.assert_equal_shape([logp_a, swapped_logp_a])
    return (first + jax.nn.sigmoid(_difference(swapped_logp_b, swapped_logp_a))) / 2


def baseline_reward(preference: Float[Array, " B"], *, least: Scalar = 1e-4) -> Float[Array, " B"]:
    """Reward of an answer against a fixed one: logit(p(answer preferred to the baseline)).

    See "Statistical Rejection Sampling Improves Preference Optimization", Liu et al.
    (https://arxiv.org/abs/2309.06657), eq. 7.

    Args:
      preference: `[B]`, probabilities of being preferred to one answer of the supervised model to the same prompt.
      least: probabilities are clipped to [least, 1 - least].
    """
    chex.assert_rank(preference, 1)
    p = jnp.clip(jax.lax.stop_gradient(preference.astype(jnp.float32)), least, 1 - least)
    return jnp.log(p) - jnp.log1p(-p)


def _difference(left: Array, right: Array) -> Array:
    chex.assert_rank([left, right], 1)
    chex.assert_equal_shape([left, right])
    # a word of probability 0 must not make -inf - -inf
    left, right = (jnp.maximum(jax.lax.stop_gradient(x.astype(jnp.float32)), LEAST_LOGP) for x in (left, right))
    return left - right
