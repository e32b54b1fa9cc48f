"""Losses of pairwise preference models as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import softplus


def likelihood(logit, p):
    """-p log sigmoid(logit) - (1 - p) log sigmoid(-logit)."""
    return p * softplus(-logit) + (1 - p) * softplus(logit)


def preference_model(x):
    out = np.zeros(x["left"].shape)
    for i in np.ndindex(out.shape):
        out[i] = likelihood(x["left"][i] - x["right"][i], float(x["preference"][i]))
    return out


def symmetric_preference_model(x):
    rows = zip(x["logit"], x["swapped_logit"], x["preference"], strict=True)
    return np.array([likelihood(a, p) / 2 + likelihood(b, 1 - p) / 2 for a, b, p in rows])
