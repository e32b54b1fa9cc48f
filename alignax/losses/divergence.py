"""Per-token KL divergence between two policies, estimated from samples or exact, and entropy; d = logp - ref_logp.

See "Approximating KL Divergence", Schulman (http://joschu.net/blog/kl-approx.html). From samples of pi, k1, k2 and k3
estimate KL(pi || ref). As a *reward*, use k1: its expectation is the KL, and so is that of its policy gradient. As a
*loss*, use k2 or `k3_straight_through`, whose expected gradient is that of KL(pi || ref); the gradient of k3 (GRPO as
published) is that of KL(ref || pi), and k1's is zero in expectation. From samples of the other policy, as PPO has them
of the old one, `k3_forward` estimates KL(ref || pi). Log-probabilities count for no less than -1e4.

How far a policy has moved since it sampled, `approx_kl`, is the mean of `k3(old_logp, logp, mask)` here, of
`k1(old_logp, logp, mask)` in verl and OpenRLHF, of `k2` in TRL and lm-human-preferences.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.types import LEAST_LOGP, Array, Scalar


def k1(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k1: d. Unbiased, of high variance, may be negative."""
    return _difference(logp, ref_logp, mask)


def k2(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k2: d^2 / 2. Biased, never negative; its gradient is unbiased."""
    return _difference(logp, ref_logp, mask) ** 2 / 2


def k3(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k3: exp(-d) - 1 + d. Unbiased and never negative. d is clipped to [-20, 20] so that no token can overflow."""
    d = jnp.clip(_difference(logp, ref_logp, mask), -20.0, 20.0)
    return jnp.expm1(-d) + d


def k3_capped(
    logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array, *, cap: Scalar = 10.0
) -> Float[Array, "B T"]:
    """k3, verl's cap: min(exp(-d) - 1 + d, cap), without a gradient beyond it. Biased."""
    return jnp.minimum(k3(logp, ref_logp, mask), cap)


def k1_straight_through(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k1, straight through (verl's k1+): the value of k1, d, with the gradient of k2; both unbiased."""
    return _straight_through(k1(logp, ref_logp, mask), k2(logp, ref_logp, mask))


def k3_straight_through(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k3, straight through (verl's k3+): the value of k3, exp(-d) - 1 + d, with the gradient of k2; both unbiased."""
    return _straight_through(k3(logp, ref_logp, mask), k2(logp, ref_logp, mask))


def k3_forward(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """k3, forward: exp(d) - 1 - d, KL(ref || pi) from samples of ref; unbiased in value and gradient, never negative.

    With the policy that sampled as ref it is the penalty of PPO's second objective (`ppo_penalty`). d is clipped to
    [-20, 20] so that no token can overflow.
    """
    d = jnp.clip(_difference(logp, ref_logp, mask), -20.0, 20.0)
    return jnp.expm1(d) - d


def absolute(logp: Float[Array, "B T"], ref_logp: Float[Array, "B T"], mask: Array) -> Float[Array, "B T"]:
    """Absolute difference: |d|, how far the policies are apart on the sampled tokens. Not a KL; for monitoring."""
    return jnp.abs(_difference(logp, ref_logp, mask))


def full_kl(logits: Float[Array, "B T V"], ref_logits: Float[Array, "B T V"], mask: Array) -> Float[Array, "B T"]:
    """KL over the vocabulary: sum_v p_v (log p_v - log q_v), p and q the softmax of logits and ref_logits.

    KL(p || q), exact, where `[B, T, V]` of both policies is at hand. Swap the arguments for KL(q || p). Neither side is
    a constant: stop the gradient of the one that is frozen.

    Args:
      logits, ref_logits: `[B, T, V]`, of the distribution each token was drawn from.
      mask: `[B, T]`, the tokens that count.
    """
    chex.assert_rank([logits, ref_logits], 3)
    chex.assert_equal_shape([logits, ref_logits])
    chex.assert_shape(mask, logits.shape[:2])
    chosen = (mask != 0)[..., None]
    logp, ref_logp = (jax.nn.log_softmax(jnp.where(chosen, x.astype(jnp.float32), 0.0)) for x in (logits, ref_logits))
    # a symbol of probability 0 adds 0; inside the product it would be 0 * inf in value and gradient
    possible = logp > -jnp.inf
    logp, ref_logp = (jnp.where(possible, x, 0.0) for x in (logp, ref_logp))
    return jnp.sum(jnp.where(possible, jnp.exp(logp) * (logp - ref_logp), 0.0), axis=-1)


def entropy(logits: Float[Array, "B T V"], mask: Array) -> Float[Array, "B T"]:
    """Entropy: H = -sum_v p_v log p_v, p the softmax of logits, in nats.

    Minus a weight times it is the entropy bonus of a policy loss, which `alignax.algorithms` has as `entropy_weight`.
    Where the logits of all tokens do not fit, `alignax.logprobs.score` gives it in chunks. See "Asynchronous Methods
    for Deep Reinforcement Learning", Mnih et al. (https://arxiv.org/abs/1602.01783), section 4.

    Args:
      logits: `[B, T, V]`, of the distribution each token was drawn from.
      mask: `[B, T]`, the tokens that count.
    """
    chex.assert_rank(logits, 3)
    chex.assert_shape(mask, logits.shape[:2])
    logp = jax.nn.log_softmax(jnp.where((mask != 0)[..., None], logits.astype(jnp.float32), 0.0))
    logp = jnp.maximum(logp, LEAST_LOGP)  # 0 log 0 is 0
    return jnp.where(mask != 0, -jnp.sum(jnp.exp(logp) * logp, axis=-1), 0.0)


def _straight_through(value: Array, gradient: Array) -> Float[Array, "B T"]:
    return gradient - jax.lax.stop_gradient(gradient) + jax.lax.stop_gradient(value)


def _difference(logp: Array, ref_logp: Array, mask: Array) -> Array:
    chex.assert_rank([logp, ref_logp, mask], 2)
    chex.assert_equal_shape([logp, ref_logp, mask])
    logp, ref_logp = (jnp.where(mask != 0, x.astype(jnp.float32), 0.0) for x in (logp, ref_logp))
    # a token of probability 0 under both is as probable under either: 0, not NaN
    return jnp.maximum(logp, LEAST_LOGP) - jax.lax.stop_gradient(jnp.maximum(ref_logp, LEAST_LOGP))
