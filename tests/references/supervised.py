"""Supervised objectives as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import tokens


def cross_entropy(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            out[b, t] = -x["logp"][b, t]
    return out
