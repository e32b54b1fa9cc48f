"""Losses of reward models as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import softplus


def bradley_terry(x, margin=None, preference=None):
    out = []
    for b in range(len(x["chosen"])):
        m = x["margin"][b] if "margin" in x else margin or 0.0
        p = x["preference"][b] if "preference" in x else 1.0 if preference is None else preference
        d = x["chosen"][b] - x["rejected"][b] - m
        out.append(p * softplus(-d) + (1 - p) * softplus(d))
    return np.array(out)


def reward_centering(x):
    return np.array([(chosen + rejected) ** 2 for chosen, rejected in zip(x["chosen"], x["rejected"], strict=True)])
