"""Whether sampler and trainer agree: what each says of the tokens that were sampled."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax import reduce
from alignax.logprobs import token_logprobs
from alignax.sampling.generate import Samples
from alignax.types import Array, Model, Params, Scalar


class ParityReport(NamedTuple):
    """How far the two are apart over the sampled tokens, in nats, float32 []; all 0 where there are none."""

    max: Array  # the largest |trainer - sampler|
    mean: Array  # the mean of them
    k3: Array  # KL(sampler || trainer) of a token, estimated
    outside: Array  # the fraction of tokens with a difference above the tolerance, or none that is a number
    tokens: Array  # how many there are


def parity_report(
    model: Model,
    params: Params,
    samples: Samples,
    *,
    temperature: Scalar = 1.0,
    tolerance: Scalar = 0.01,
) -> ParityReport:
    """Scores samples as the trainer does and compares. Pure: jit it with the model fixed, and let it run before the
    parameters learn from the samples.

    float32 on both sides leaves rounding, about 1e-6 of mean difference, and a sampler in bfloat16 about 1e-2. More has
    a reason: another temperature, weights that are not the trainer's, a position or a slot of the cache that is wrong.

    Args:
      model: the trainer's, in the precision it computes in.
      params: the trainer's parameters.
      samples: from the sampler, which may have computed in another precision.
      temperature: the sampler's, one number or `[R]`. 0 counts as 1, at which greedy rows report their logp. Filters
        and penalties are no matter: `processed_logp` is not read.
      tolerance: the largest difference that is as it should be, in nats.

    Raises:
      ValueError: for a temperature known to be negative, or of another shape.
    """
    rows = len(samples.tokens)
    if np.shape(temperature) not in ((), (rows,)):
        raise ValueError(f"parity_report: temperature of shape {np.shape(temperature)}; expected a number or ({rows},)")
    if not isinstance(temperature, Tracer) and not np.all(np.asarray(temperature) >= 0):
        raise ValueError(f"parity_report: temperature={temperature}; expected 0 or more")
    heat = jnp.broadcast_to(jnp.where(jnp.asarray(temperature) == 0, 1.0, temperature), (rows,))
    logp = token_logprobs(model, params, samples.tokens, samples.segments, mask=samples.mask, temperature=heat)
    return compare_logp(logp, samples.logp, samples.mask, tolerance=tolerance)


def compare_logp(
    logp: Float[Array, "R T"], rollout_logp: Float[Array, "R T"], mask: Array, *, tolerance: Scalar = 0.01
) -> ParityReport:
    """The report where the trainer's log-probabilities are at hand.

    k3 is the mean of exp(d) - 1 - d over tokens that the sampler drew, d = logp - rollout_logp: an estimate of
    KL(sampler || trainer) that is never negative, and unbiased where nothing but the temperature bent what was drawn
    from. d counts for 20 at most. See "Approximating KL Divergence", Schulman (http://joschu.net/blog/kl-approx.html).

    Args:
      logp: `[R, T]`, by the trainer's arithmetic.
      rollout_logp: `[R, T]`, as the sampler reported them.
      mask: `[R, T]`, the sampled tokens; what lies off it is not read.
      tolerance: in nats.
    """
    difference = jnp.where(mask != 0, logp.astype(jnp.float32) - rollout_logp.astype(jnp.float32), 0.0)
    size = jnp.abs(difference)
    clipped = jnp.clip(difference, -20.0, 20.0)
    outside = (~(size <= tolerance)).astype(jnp.float32)  # NaN is outside
    mean = reduce.token_mean(size, mask)
    return ParityReport(
        max=jnp.max(size, initial=0.0),
        mean=mean.value(),
        k3=reduce.token_mean(jnp.expm1(clipped) - clipped, mask).value(),
        outside=reduce.token_mean(outside, mask).value(),
        tokens=mean.count,
    )
