"""What the tables of vectors share."""

import jax.numpy as jnp
import numpy as np

from alignax import reduce
from alignax.types import Response

MEANS = {
    "token-mean": reduce.token_mean,
    "seq-mean-token-mean": reduce.sequence_mean,
    "seq-mean-token-sum": reduce.sequence_sum,
}


def floats(x, *names):
    """The inputs of these names, float32."""
    return [jnp.asarray(x[name], jnp.float32) for name in names]


def response(total, ref_total=None, lengths=None, **extra):
    """Responses [B] of these sums of log-probabilities, spread evenly over the tokens (one each, unless told)."""
    lengths = np.ones(len(total), int) if lengths is None else np.array(lengths)
    mask = np.arange(max(lengths)) < lengths[:, None]

    def spread(sums):
        return None if sums is None else jnp.asarray(mask * (np.array(sums) / lengths)[:, None], jnp.float32)

    extra = {name: jnp.asarray(x, jnp.float32) for name, x in extra.items()}
    return Response(spread(total), spread(ref_total), jnp.asarray(mask), extra)


def pair(x):
    """The chosen and the rejected side of a vector of spec/preference.md."""
    return tuple(
        response(x[f"{side}_logps"], x.get(f"ref_{side}_logps"), x.get(f"{side}_lens"))
        for side in ("chosen", "rejected")
    )
