"""Supervised objectives over tokens: imitate given ones.

What a loss reads beside the log-probability of a token (`alignax.losses.needs`) is a field of `logprobs.Scores`.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check
from alignax.losses.extras import needs
from alignax.types import LEAST_LOGP, Array, Scalar


def cross_entropy(logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Token cross-entropy: -log p(token).

    The loss of supervised fine-tuning, 0 where masked out. See "Training language models to follow instructions with
    human feedback", Ouyang et al. (https://arxiv.org/abs/2203.02155), section 3.5.

    Args:
      logp: `[B, T]`, log-probability of each token.
      mask: `[B, T]`, the tokens to learn.
    """
    return -jnp.maximum(_masked(mask, logp)[0], LEAST_LOGP)


@needs("mean_logp")
def smoothed_cross_entropy(
    logp: Float[Array, "B T"], mean_logp: Float[Array, "B T"], mask: Array, *, label_smoothing: Scalar = 0.1
) -> Float[Array, "B T"]:
    """Cross-entropy with label smoothing: -(1 - eps) log p(token) - eps mean_v log p_v.

    The target is the token with probability 1 - eps and any of the vocabulary, the token among them, otherwise. See
    "Rethinking the Inception Architecture for Computer Vision", Szegedy et al. (https://arxiv.org/abs/1512.00567),
    section 7.

    Args:
      logp: `[B, T]`, log-probability of each token.
      mean_logp: `[B, T]`, the mean of log p over the vocabulary at each token.
      mask: `[B, T]`, the tokens to learn.
      label_smoothing: in [0, 1] (paper: epsilon).

    Raises:
      ValueError: for a label_smoothing known to lie outside [0, 1].
    """
    expected = "0 <= label_smoothing <= 1"
    check("smoothed_cross_entropy", "label_smoothing", label_smoothing, lambda x: (x >= 0) & (x <= 1), expected)
    logp, mean_logp = (jnp.maximum(x, LEAST_LOGP) for x in _masked(mask, logp, mean_logp))
    return -(1 - label_smoothing) * logp - label_smoothing * mean_logp


def dft(logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """DFT, dynamic fine-tuning: -sg(p(token)) log p(token).

    The gradient of the cross-entropy grows without bound as a token becomes improbable; weighted by the probability, a
    constant, it does not. See "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward
    Rectification", Wu et al. (https://arxiv.org/abs/2508.05629).

    Args:
      logp: `[B, T]`, log-probability of each token.
      mask: `[B, T]`, the tokens to learn.
    """
    logp = jnp.maximum(_masked(mask, logp)[0], LEAST_LOGP)
    return -jax.lax.stop_gradient(jnp.exp(jnp.minimum(logp, 0.0))) * logp


def z_loss(log_normalizer: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """z-loss: (logsumexp_v logits_v)^2.

    With a small weight (1e-4 where it was published) beside a cross-entropy, which does not see it, the logits do not
    drift. See "PaLM: Scaling Language Modeling with Pathways", Chowdhery et al. (https://arxiv.org/abs/2204.02311),
    section 5.

    Args:
      log_normalizer: `[B, T]`, the log-normaliser of the distribution of each token (paper: log Z).
      mask: `[B, T]`, the tokens that are learned.
    """
    return _masked(mask, log_normalizer)[0] ** 2


def _masked(mask: Array, *arrays: Array) -> list[Array]:
    chex.assert_rank([*arrays, mask], 2)
    chex.assert_equal_shape([*arrays, mask])
    return [jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in arrays]
