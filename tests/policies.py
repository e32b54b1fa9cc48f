"""What the tests of policy losses share: their inputs, and gradients of which a part is a constant."""

from functools import partial

import numpy as np
from properties import CONSTANT, LOGP, Input, Row, make, real

POLICY = {"logp": LOGP, "old_logp": CONSTANT, "advantages": Input(make=real)}


def sample(inputs=POLICY, **options):
    """Random inputs as numpy arrays, masks beside them."""
    return make(Row(None, None, None, inputs), **options)


def fixed(loop, inputs=POLICY):
    """The loop, its constants those of the point where the harness differentiates."""
    x = sample(inputs, seed=1)
    return partial(loop, at={n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in x.items()})
