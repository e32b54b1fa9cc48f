"""The weights that a sampler reads: a copy of the trainer's in fewer bits."""

from typing import Any

import jax
import jax.numpy as jnp

from alignax.types import Params


def rollout_params(params: Params, dtype: Any = jnp.bfloat16) -> Params:
    """The parameters with every floating leaf cast; other leaves, such as quantised ones, stay as they are.

    The trainer keeps its float32 masters. Compile it and call it once for each update, so that no step of decoding
    casts anything; sharded leaves stay where they are:

        rollout_model = models.transformer(dataclasses.replace(model.config, dtype=jnp.bfloat16))
        sample = jax.jit(functools.partial(sampling.generate, rollout_model, max_new_tokens=128))
        cast = jax.jit(sampling.rollout_params)
        samples = sample(cast(params), prompts, lengths, key)

    The model that samples computes in `config.dtype` and keeps its cache in it; the trainer's own `model` goes on
    computing in float32. `sampling.parity_report(model, params, samples)` says what that costs, and a correction from
    `alignax.corrections` makes up for it.

    Args:
      params: any pytree of arrays. Of a mixture, cast its two networks and leave their weight.
      dtype: a floating one.

    Raises:
      ValueError: for a dtype that is none.
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"rollout_params: dtype={jnp.dtype(dtype)}; expected a floating-point dtype")

    def cast(leaf: Any) -> Any:
        return jnp.asarray(leaf, dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

    return jax.tree.map(cast, params)
