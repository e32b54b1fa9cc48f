"""Losses of critics as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import tokens


def value_clip(x, clip=0.2):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            value, old, target = (x[name][b, t] for name in ("values", "old_values", "returns"))
            near = min(max(value, old - clip), old + clip)
            out[b, t] = max((value - target) ** 2, (near - target) ** 2) / 2
    return out
