"""The geometric mixture of a policy and its reference, as a `Model`: Nash-MD plays against it, IPO-MD samples from it.

    mixed = models.mixture(model)
    samples = sampling.generate(mixed, {"policy": p, "reference": q, "weight": 0.125}, prompts, lengths, key, ...)

It is mixed token by token, pi(y_t)^(1-b) ref(y_t)^b normalised over the vocabulary, as in the papers' experiments: the
mixture of whole sequences has a normaliser that nobody can compute. See "Nash Learning from Human Feedback", Munos
et al. (https://arxiv.org/abs/2312.00886), section 7.
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax.models.pair import pair
from alignax.types import Array, Model, Scalar


def geometric_mixture_logits(
    policy_logits: Float[Array, "... V"], ref_logits: Float[Array, "... V"], *, mix: Scalar
) -> Float[Array, "... V"]:
    """Geometric mixture, logits: (1 - b) policy_logits + b ref_logits, those of pi^(1-b) ref^b, normalisers aside.

    See "Nash Learning from Human Feedback", Munos et al. (https://arxiv.org/abs/2312.00886), section 7. A
    token that one of the two excludes (-inf) is excluded, unless that one has no weight.

    Args:
      policy_logits, ref_logits: over the same vocabulary.
      mix: the reference's part, in [0, 1] (paper: beta); 0 is the policy, 1 the reference.

    Raises:
      ValueError: for logits of different shapes, or a mix known to lie outside [0, 1].
    """
    if policy_logits.shape != ref_logits.shape:
        raise ValueError(
            f"geometric_mixture_logits: logits of shape {policy_logits.shape} and {ref_logits.shape}; expected the same"
        )
    if not isinstance(mix, Tracer) and not 0 <= np.asarray(mix) <= 1:
        raise ValueError(f"geometric_mixture_logits: mix={mix}; expected 0 to 1")
    mix = jnp.asarray(mix, jnp.float32)

    def part(weight: Array, logits: Array) -> Array:
        return jnp.where(weight == 0, 0.0, weight * logits.astype(jnp.float32))  # 0 * -inf is NaN

    return part(1 - mix, policy_logits) + part(mix, ref_logits)


def mixture(policy: Model, reference: Model | None = None) -> Model:
    """Geometric mixture, model: pi^(1-b) ref^b token by token, of two parameter sets of one model, or of two models.

    See "Nash Learning from Human Feedback", Munos et al. (https://arxiv.org/abs/2312.00886), section 7.

    Parameters are `{"policy": params, "reference": params, "weight": b}`, b being the reference's part: an array, so
    that changing it compiles nothing. Both networks run, and both keep a cache; see `pair` for what else holds. It
    samples and scores; there is no scalar head, and auxiliary losses are the policy's.

    Args:
      policy: a model.
      reference: another of the same vocabulary; None: the same model.

    Raises:
      ValueError: when other parameters reach it, or the vocabularies differ.
    """

    def mix(policy_logits: Array, ref_logits: Array, *, weight: Array) -> Array:
        return geometric_mixture_logits(policy_logits, ref_logits, mix=weight)

    return pair("a mixture", {"policy": policy, "reference": reference or policy}, {"weight": 0.5}, mix)
