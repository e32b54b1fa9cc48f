"""Losses of reward models: over pairs `loss(chosen, rejected, *, ...) -> [B]`, over rated rows `loss(scores, targets)`.

A score learned from pairs has no zero of its own: adding a constant to every score of a prompt changes no preference.
`reward_centering` fixes the constant.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Float

from alignax.losses._checks import check
from alignax.losses._logistic import binary_cross_entropy
from alignax.types import Array, Scalar


def bradley_terry(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    margin: Float[Array, " B"] | Scalar = 0.0,
    preference: Float[Array, " B"] | Scalar = 1.0,
) -> Float[Array, " B"]:
    """Bradley-Terry likelihood of a preference: -p log sigmoid(d - m) - (1 - p) log sigmoid(m - d).

    d = chosen - rejected. See "Rank Analysis of Incomplete Block Designs: I. The Method of Paired Comparisons", Bradley
    and Terry (https://doi.org/10.2307/2334029), and "Training language models to follow instructions with human
    feedback", Ouyang et al. (https://arxiv.org/abs/2203.02155), eq. 1. The margin is that of "Llama 2: Open Foundation
    and Fine-Tuned Chat Models", Touvron et al. (https://arxiv.org/abs/2307.09288), eq. 2.

    Args:
      chosen, rejected: `[B]`, the scores.
      margin: `[B]` or one number, a constant: how far apart the scores should be at least (paper: m(r), 1 for
        "significantly better" down to 0 for "negligibly better", or three times that).
      preference: `[B]` or one number in [0, 1], a constant: the probability that the chosen side is the preferred one,
        as a share of annotators, or 1 - eps for label smoothing (labels that are wrong with probability eps); at 0.5
        the pair is a tie.

    Raises:
      ValueError: for a margin or preference of another shape, or a preference known to lie outside [0, 1].
    """
    chosen, rejected = _scores(chosen, rejected)
    for name, x in (("margin", margin), ("preference", preference)):
        if jnp.shape(x) not in ((), chosen.shape):
            raise ValueError(f"bradley_terry: {name} of shape {jnp.shape(x)}; expected a number or {chosen.shape}")
    _check_probability("bradley_terry", "preference", preference)
    # float32 also where margin or preference is an array of lower precision
    margin, preference = (jax.lax.stop_gradient(jnp.asarray(x, jnp.float32)) for x in (margin, preference))
    logit = chosen - rejected - margin
    return binary_cross_entropy(logit, preference)


def reward_centering(chosen: Float[Array, " B"], rejected: Float[Array, " B"]) -> Float[Array, " B"]:
    """Reward centering: (chosen + rejected)^2.

    With a small weight beside `bradley_terry`, 0.01 as a rule, scores average 0 over the sides of a pair. See "Helping
    or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking", Eisenstein et al.
    (https://arxiv.org/abs/2312.09244), eq. 2.

    Args:
      chosen, rejected: `[B]`, the scores.
    """
    chosen, rejected = _scores(chosen, rejected)
    return (chosen + rejected) ** 2


def pmp(
    good: Float[Array, " B"], bad: Float[Array, " B"], good_nll: Float[Array, " B"], *, mu: Scalar = 1.0
) -> Float[Array, " B"]:
    """PMP, preference-model pre-training: -log sigmoid(good - bad) + mu NLL(good).

    Pairs are ranked data made binary (`alignax.rewards.binarised`), which transfers better. See "A General Language
    Assistant as a Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861), section 4.

    Args:
      good, bad: `[B]`, the scores at the end of each sequence.
      good_nll: `[B]`, the language model's loss of the good sequence.
      mu: its weight: 1 in pre-training, 0 when the preference model is fine-tuned afterwards.
    """
    chex.assert_rank(good_nll, 1)
    good, bad = _scores(good, bad)
    chex.assert_equal_shape([good, good_nll])
    return jax.nn.softplus(bad - good) + mu * good_nll.astype(jnp.float32)


def reward_mse(scores: Array, targets: Array, mask: Array | None = None) -> Array:
    """Reward regression: (score - target)^2.

    For ratings; normalise them to mean 0 and standard deviation 1 for each source. With `[B, A]` every column is one
    attribute, and rows need not be rated in all: `reduce.token_mean(loss, mask)` averages what is. See "HelpSteer:
    Multi-attribute Helpfulness Dataset for SteerLM", Wang et al. (https://arxiv.org/abs/2311.09528).

    Args:
      scores: `[B]`, or `[B, A]` for A attributes.
      targets: of the same shape, the ratings, constants.
      mask: of the same shape, which of them exist; all when None.
    """
    scores, targets = _rated(scores, targets, mask)
    return (scores - targets) ** 2


def reward_huber(scores: Array, targets: Array, mask: Array | None = None, *, delta: Scalar = 1.0) -> Array:
    """Huber reward regression: e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2); e = score - target.

    A rating far off pulls no harder than one delta away. See "Robust Estimation of a Location Parameter", Huber
    (https://doi.org/10.1214/aoms/1177703732).

    Args:
      scores: `[B]`, or `[B, A]` for A attributes.
      targets: of the same shape, the ratings, constants.
      mask: of the same shape, which of them exist; all when None.
      delta: above 0, where the square ends.

    Raises:
      ValueError: for a delta known not to be positive.
    """
    check("reward_huber", "delta", delta, lambda x: (x > 0) & (x < math.inf), "0 < delta < inf")
    scores, targets = _rated(scores, targets, mask)
    error = jnp.abs(scores - targets)
    return jnp.where(error <= delta, error**2 / 2, delta * (error - delta / 2))


def reward_binary(scores: Array, targets: Array, mask: Array | None = None) -> Array:
    """Binary reward: -p log sigmoid(score) - (1 - p) log sigmoid(-score).

    For answers that are right or wrong, safe or not (the auxiliary loss of a safety reward model), or any share in
    between; for good and bad answers it is the discriminator of "Training Verifiers to Solve Math Word Problems", Cobbe
    et al. (https://arxiv.org/abs/2110.14168).

    Args:
      scores: `[B]`, or `[B, A]` for A attributes; logits.
      targets: of the same shape, the probabilities p in [0, 1], constants.
      mask: of the same shape, which of them exist; all when None.

    Raises:
      ValueError: for a target known to lie outside [0, 1].
    """
    scores, targets = _rated(scores, targets, mask)
    _check_probability("reward_binary", "targets", targets)
    loss = binary_cross_entropy(scores, targets)
    return loss if mask is None else jnp.where(mask != 0, loss, 0.0)


def _scores(chosen: Array, rejected: Array) -> tuple[Array, Array]:
    chex.assert_rank([chosen, rejected], 1)
    chex.assert_equal_shape([chosen, rejected])
    return chosen.astype(jnp.float32), rejected.astype(jnp.float32)


def _rated(scores: Array, targets: Array, mask: Array | None) -> tuple[Array, Array]:
    """Both as float32, 0 under the mask; the targets are constants."""
    arrays = [scores, targets] if mask is None else [scores, targets, mask]
    chex.assert_rank(arrays, {1, 2})
    chex.assert_equal_shape(arrays)
    scores, targets = scores.astype(jnp.float32), jax.lax.stop_gradient(targets).astype(jnp.float32)
    if mask is None:
        return scores, targets
    return jnp.where(mask != 0, scores, 0.0), jnp.where(mask != 0, targets, 0.0)


def _check_probability(loss: str, name: str, x: Array | Scalar) -> None:
    check(loss, name, x, lambda x: (x >= 0) & (x <= 1), f"0 <= {name} <= 1")
