"""The geometric mixture of a policy and its reference, as a `Model`: Nash-MD plays against it, IPO-MD samples from it.

    mixed = models.mixture(model)
    samples = sampling.generate(mixed, {"policy": p, "reference": q, "weight": 0.125}, prompts, lengths, key, ...)

It is mixed token by token, pi(y_t)^(1-b) ref(y_t)^b normalised over the vocabulary, as in the papers' experiments: the
mixture of whole sequences has a normaliser that nobody can compute. See "Nash Learning from Human Feedback", Munos
et al. (https://arxiv.org/abs/2312.00886), section 7.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Float

from alignax.types import Array, Cache, Hidden, Model, Params, Scalar

NAMES = ("policy", "reference", "weight")


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


def mixture(model: Model) -> Model:
    """Geometric mixture, model: pi^(1-b) ref^b token by token, of two parameter sets of one model.

    See "Nash Learning from Human Feedback", Munos et al. (https://arxiv.org/abs/2312.00886), section 7.

    Parameters are `{"policy": params, "reference": params, "weight": b}`, b being the reference's part: an array, so
    that changing it compiles nothing. Both networks run, and both keep a cache. It samples and scores; there is no
    scalar head, and auxiliary losses are the policy's.

    Raises:
      ValueError: when other parameters reach it.
    """

    def init(key: Array) -> Params:
        params = model.init(key)
        return {"policy": params, "reference": params, "weight": jnp.asarray(0.5)}

    def hidden(params: Params, *rows: Array, cache: Cache = None, **options: Any) -> Hidden:
        policy, reference, _ = _parts(params)
        caches = (None, None) if cache is None else cache
        found = [model.hidden(p, *rows, cache=c, **options) for p, c in zip((policy, reference), caches)]
        states = jnp.concatenate([x.states for x in found], axis=-1)
        return Hidden(states, None if cache is None else tuple(x.cache for x in found), found[0].aux)

    def logits(params: Params, states: Float[Array, "... D"]) -> Float[Array, "... V"]:
        policy, reference, weight = _parts(params)
        halves = jnp.split(states, 2, axis=-1)
        return geometric_mixture_logits(model.logits(policy, halves[0]), model.logits(reference, halves[1]), mix=weight)

    def init_cache(batch: int, length: int) -> Cache:
        return model.init_cache(batch, length), model.init_cache(batch, length)

    return Model(init, hidden, logits, init_cache, model.config, fork=_both(model.fork), unroll=_unroll(model))


def _both(fork: Callable | None) -> Callable | None:
    """`Model.fork` for the caches of both."""
    return fork and (lambda caches, *args: tuple(fork(cache, *args) for cache in caches))


def _unroll(model: Model) -> Callable | None:
    unroll = model.unroll
    return unroll and (lambda params: params | {name: unroll(params[name]) for name in NAMES[:2]})


def _parts(params: Params) -> tuple[Params, Params, Array]:
    if not (isinstance(params, dict) and set(params) == set(NAMES)):
        found = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(f"a mixture got parameters {found}; expected {NAMES}")
    policy, reference, weight = (params[name] for name in NAMES)
    return policy, reference, weight
