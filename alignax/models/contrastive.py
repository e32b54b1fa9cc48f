"""Contrastive decoding as a `Model`: what a large model says beyond what a small one says, too.

contrast = models.contrastive(large, small)
params = {"expert": p, "amateur": q, "weight": 0.5, "plausibility": 0.1}
samples = sampling.generate(contrast, params, prompts, lengths, key, temperature=0.0, ...)
"""

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax.models.pair import pair
from alignax.types import Array, Model, Scalar


def contrastive_logits(
    expert_logits: Float[Array, "... V"],
    amateur_logits: Float[Array, "... V"],
    *,
    weight: Scalar = 0.5,
    plausibility: Scalar = 0.1,
) -> Float[Array, "... V"]:
    """Contrastive decoding, logits: (1 + a) expert - a amateur where p_expert >= alpha max p_expert, -inf elsewhere.

    See "Contrastive Decoding Improves Reasoning in Large Language Models", O'Brien and Lewis
    (https://arxiv.org/abs/2309.09117), section 3, and for the plausible tokens "Contrastive Decoding: Open-ended Text
    Generation as Optimization", Li et al. (https://arxiv.org/abs/2210.15097), section 3.3. Its own expert - amateur is
    the limit of a large weight at a temperature of the weight.

    Args:
      expert_logits, amateur_logits: over the same vocabulary. Those of the amateur must be finite where the expert's
        are plausible: the contrast to a probability of 0 is infinite.
      weight: of the contrast, at least 0 (paper: beta); 0 is the expert, on its plausible tokens.
      plausibility: in [0, 1] (paper: alpha); 0 leaves out nothing, 1 all but the expert's best.

    Raises:
      ValueError: for logits of different shapes, or numbers known to lie out of range.
    """
    if expert_logits.shape != amateur_logits.shape:
        shapes = f"{expert_logits.shape} and {amateur_logits.shape}"
        raise ValueError(f"contrastive_logits: logits of shape {shapes}; expected the same")
    if not isinstance(weight, Tracer) and not 0 <= np.asarray(weight) < np.inf:
        raise ValueError(f"contrastive_logits: weight={weight}; expected 0 or more")
    if not isinstance(plausibility, Tracer) and not 0 <= np.asarray(plausibility) <= 1:
        raise ValueError(f"contrastive_logits: plausibility={plausibility}; expected 0 to 1")
    expert, amateur = expert_logits.astype(jnp.float32), amateur_logits.astype(jnp.float32)
    weight, plausibility = jnp.asarray(weight, jnp.float32), jnp.asarray(plausibility, jnp.float32)
    gap = jnp.max(expert, axis=-1, keepdims=True) - expert
    # said as what is left out, so that NaN stays
    out = (gap > -jnp.log(plausibility)) | (expert == -jnp.inf)
    contrast = jnp.where(weight == 0, 0.0, weight * (expert - jnp.where(out, 0.0, amateur)))  # 0 * inf is NaN
    return jnp.where(out, -jnp.inf, expert + contrast)


def contrastive(expert: Model, amateur: Model) -> Model:
    """Contrastive decoding, model: (1 + a) expert - a amateur among what the expert finds plausible, token by token.

    See "Contrastive Decoding Improves Reasoning in Large Language Models", O'Brien and Lewis
    (https://arxiv.org/abs/2309.09117), and `contrastive_logits`.

    The two may differ in all but their vocabulary. Parameters are `{"expert": params, "amateur": params, "weight": a,
    "plausibility": alpha}`, the last two arrays. Both networks run, and both keep a cache; see `pair` for what else
    holds. Logits are mixed before the temperature. It samples, and scores what it samples; it is not for training, as
    tokens that are not plausible have a log-probability of -inf.

    Raises:
      ValueError: when other parameters reach it, or the vocabularies differ.
    """
    members, numbers = {"expert": expert, "amateur": amateur}, {"weight": 0.5, "plausibility": 0.1}
    return pair("a contrast", members, numbers, contrastive_logits)
