"""Parameters of a network drawn by numpy: `Model.init` is a program that takes seconds to compile."""

import jax
import jax.numpy as jnp
import numpy as np

from alignax.types import Model, Params


def drawn(model: Model, scale: float = 0.3, seed: int = 0) -> Params:
    """Normal weights and biases, norms' scales about 1, in the shapes and dtypes of `model.init`."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = scale * rng.normal(size=leaf.shape)
        centre = 1.0 if getattr(path[-1], "key", None) == "scale" else 0.0
        return jnp.asarray(centre + values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))
