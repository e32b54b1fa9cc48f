"""DPO that trains adapters alone, as one more row of `problems.problems`; the base is its reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from problems import ROWS, Problem, rows, tiny

from alignax.algorithms import preference
from alignax.models import LoraConfig, lora

CONFIG = LoraConfig(rank=2, alpha=3.0)


@functools.cache
def start(config=CONFIG):
    """The tiny model and adapters away from their start, so that every leaf has a gradient."""
    model, base = tiny()
    rng = np.random.default_rng(7)
    adapters = jax.jit(lora.init, static_argnums=2)(jax.random.key(2), base, config)
    return model, jax.tree.map(lambda x: jnp.asarray(x + rng.normal(0, 0.1, x.shape).astype(x.dtype)), adapters)


def lora_problem(config=CONFIG):
    """One batch of pairs; the frozen weights are the base."""
    batch = preference.Batch(**rows(ROWS, 2), weights=np.where(np.arange(ROWS) == 2, 0, 1).astype(np.float32))

    def make_loss(model):
        return lora.adapted(preference.make_loss(model), config)

    return Problem(make_loss, batch, {"base": tiny()[1]}, {"beta": 0.3}, functools.partial(start, config))
