"""Losses of single answers, good or bad: `loss(response, desirable, ...) -> [B]`, and the numbers of a batch they need.

Notation: x = log pi(y|x) - log ref(y|x) of an answer, s = sigmoid. The reference is a constant. What a loss must know
of the whole batch (`kl`, `delta`) is an argument and a constant; what computes it gives a `Mean`, so that
micro-batches, devices and processes add up: see `alignax.algorithms.kto.make_statistics`.
"""

import chex
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Shaped

from alignax import reduce
from alignax.losses._checks import check, check_positive
from alignax.losses._sides import check_reference, log_ratio
from alignax.types import Array, Mean, Response, Scalar


def kto(
    response: Response,
    desirable: Shaped[Array, " B"],
    kl: Scalar,
    *,
    beta: Scalar = 0.1,
    desirable_weight: Scalar = 1.0,
    undesirable_weight: Float[Array, " B"] | Scalar = 1.0,
) -> Float[Array, " B"]:
    """KTO: desirable w_D (1 - s(beta (x - z0))), undesirable w_U (1 - s(beta (z0 - x))), z0 = max(0, kl).

    The value of an answer is measured from z0, the policy's KL to its reference, and saturates on both sides: an
    outlier or a wrong label has little gradient. Where one class is rarer, set one weight so that
    w_D n_desirable / (w_U n_undesirable) lies in [1, 4/3]. See "KTO: Model Alignment as Prospect Theoretic
    Optimization", Ethayarajh et al. (https://arxiv.org/abs/2402.01306), eq. 8.

    Args:
      response: the answers.
      desirable: `[B]`, whether each is good. One class may be missing.
      kl: the mean log-ratio of mismatched pairs over the whole batch, see `mismatched_kl`; a constant.
      beta: how strongly the reference holds (paper: beta).
      desirable_weight: of good answers (paper: lambda_D).
      undesirable_weight: of bad answers, one number or `[B]` (paper: lambda_U).

    Raises:
      ValueError: for a beta known not to be above 0, answers without a reference, a kl that is not one number,
        labels known to be other than 0 and 1.
    """
    check_positive("kto", beta=beta)
    x, sign, weight = _classes("kto", response, desirable, desirable_weight, undesirable_weight)
    z0 = jnp.maximum(_constant("kto", "kl", kl), 0.0)
    return weight * jax.nn.sigmoid(-sign * beta * (x - z0))


def apo_zero_unpaired(response: Response, desirable: Shaped[Array, " B"], *, beta: Scalar = 0.1) -> Float[Array, " B"]:
    """APO-zero of single answers: desirable 1 - s(beta x), undesirable s(beta x); KTO with its z0 at 0.

    Good answers become likelier than they were, bad ones less likely, with no number of the batch. See "Anchored
    Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment", D'Oosterlinck et al.
    (https://arxiv.org/abs/2408.06266); TRL applies it to single answers.

    Args:
      response: the answers.
      desirable: `[B]`, whether each is good.
      beta: how strongly the reference holds (paper: beta).

    Raises:
      ValueError: for a beta known not to be above 0, answers without a reference.
    """
    check_positive("apo_zero_unpaired", beta=beta)
    check_reference("apo_zero_unpaired", response)
    return kto(response, desirable, 0.0, beta=beta)


def bco(
    response: Response,
    desirable: Shaped[Array, " B"],
    delta: Scalar,
    *,
    beta: Scalar = 0.1,
    undesirable_weight: Float[Array, " B"] | Scalar = 1.0,
) -> Float[Array, " B"]:
    """BCO, binary classifier optimisation: desirable -log s(beta x - delta), undesirable -w log s(-(beta x - delta)).

    The implicit reward becomes the logit of a classifier of good answers; delta, the mean reward seen so far, lets it
    tell them apart from the start. See "Binary Classifier Optimization for Large Language Model Alignment", Jung et al.
    (https://arxiv.org/abs/2404.04656).

    Args:
      response: the answers.
      desirable: `[B]`, whether each is good.
      delta: the running mean of beta x over all answers, this batch's included: `mean_reward`, `bco_delta`; a constant.
      beta: how strongly the reference holds (paper: beta).
      undesirable_weight: of bad answers, one number or `[B]`: `udm_weights` where good and bad answers have different
        prompts.

    Raises:
      ValueError: for a beta known not to be above 0, answers without a reference, a delta that is not one
        number, labels known to be other than 0 and 1.
    """
    check_positive("bco", beta=beta)
    x, sign, weight = _classes("bco", response, desirable, 1.0, undesirable_weight)
    return weight * jax.nn.softplus(-sign * (beta * x - _constant("bco", "delta", delta)))


def udm_weights(probability: Float[Array, " B"], *, low: Scalar = 0.5, high: Scalar = 10.0) -> Float[Array, " B"]:
    """Underlying distribution matching: clip(p / (1 - p + 1e-8), low, high), weights of BCO's undesirable answers.

    p comes from a classifier of prompts and says how likely a bad answer's prompt is among those of good answers; so
    weighted, both classes have one distribution of prompts. See "Binary Classifier Optimization for Large Language
    Model Alignment", Jung et al. (https://arxiv.org/abs/2404.04656).

    Args:
      probability: `[B]`, in [0, 1]; a constant.
      low, high: the range of the weights.

    Raises:
      ValueError: for low above high, or below 0; for a probability known to lie outside [0, 1].
    """
    if not isinstance(low, Tracer) and not isinstance(high, Tracer) and not 0 <= low <= high:
        raise ValueError(f"udm_weights: low={low}, high={high}; expected 0 <= low <= high")
    chex.assert_rank(probability, 1)
    check("udm_weights", "probability", probability, lambda x: (x >= 0) & (x <= 1), "0 <= probability <= 1")
    p = jax.lax.stop_gradient(probability.astype(jnp.float32))
    return jnp.clip(p / (1 - p + 1e-8), low, high)


def mismatched_kl(response: Response, weights: Float[Array, " B"] | None = None) -> Mean:
    """KTO's kl: the mean of x over answers to other prompts than their own; empty answers are left out.

    See "KTO: Model Alignment as Prospect Theoretic Optimization", Ethayarajh et al. (https://arxiv.org/abs/2402.01306),
    section 4.1.

    Args:
      response: the mismatched answers: prompt i with the answer to prompt j.
      weights: `[B]`, 0 for rows that do not count.

    Raises:
      ValueError: for answers without a reference.
    """
    check_reference("mismatched_kl", response)
    counted = (response.length > 0).astype(jnp.float32)
    weights = counted if weights is None else counted * weights.astype(jnp.float32)
    return reduce.batch_mean(jax.lax.stop_gradient(log_ratio(response)), weights)


def mean_reward(response: Response, weights: Float[Array, " B"] | None = None, *, beta: Scalar = 0.1) -> Mean:
    """BCO's delta of one batch: the mean of beta x over all answers, good and bad.

    See "Binary Classifier Optimization for Large Language Model Alignment", Jung et al.
    (https://arxiv.org/abs/2404.04656).

    Args:
      response: the answers.
      weights: `[B]`, 0 for rows that do not count.
      beta: the loss's.

    Raises:
      ValueError: for a beta known not to be above 0, answers without a reference.
    """
    check_positive("mean_reward", beta=beta)
    check_reference("mean_reward", response)
    return reduce.batch_mean(jax.lax.stop_gradient(beta * log_ratio(response)), weights)


def bco_delta(delta: Scalar, count: Scalar, batch: Mean) -> tuple[Array, Array]:
    """BCO's running delta: delta + (mean - delta) n / (count + n), of a batch of n answers; and count + n.

    With a count of 0 it is the batch's mean. Update before the loss, not in an evaluation. See "Binary Classifier
    Optimization for Large Language Model Alignment", Jung et al. (https://arxiv.org/abs/2404.04656).

    Args:
      delta, count: the mean so far, and of how many answers.
      batch: `mean_reward` over the whole batch.
    """
    total = count + batch.count
    rate = jnp.where(total > 0, batch.count / jnp.where(total > 0, total, 1.0), 0.0)
    return delta + (batch.value() - delta) * rate, total


def _classes(
    loss: str, response: Response, desirable: Array, desirable_weight: Scalar, undesirable_weight: Array | Scalar
) -> tuple[Array, Array, Array]:
    """x, the sign of the answer's class (1 for good, -1 for bad) and the weight of its class; all `[B]`."""
    check_reference(loss, response)
    x = log_ratio(response)
    chex.assert_shape(desirable, x.shape)
    check(loss, "desirable", desirable, lambda x: (x == 0) | (x == 1), "0 or 1")  # not 1 or -1, both of them true
    good, undesirable = desirable != 0, jax.lax.stop_gradient(jnp.asarray(undesirable_weight, jnp.float32))
    if undesirable.shape not in ((), x.shape):
        raise ValueError(f"undesirable_weight of shape {undesirable.shape}; expected a number or {x.shape}")
    weight = jnp.where(good, jnp.asarray(desirable_weight, jnp.float32), undesirable)
    return x, jnp.where(good, 1.0, -1.0), weight


def _constant(loss: str, name: str, value: Scalar) -> Array:
    if jnp.ndim(value):
        raise ValueError(f"{loss}: {name} of shape {jnp.shape(value)}; expected one number for the whole batch")
    return jax.lax.stop_gradient(jnp.asarray(value, jnp.float32))
