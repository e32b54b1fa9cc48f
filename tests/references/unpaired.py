"""Losses of single answers as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import sigmoid, softplus, tokens


def rows(x):
    """Of every answer: its log-ratio, whether it is good, what it weighs if it is bad (1 unless told)."""
    for b in range(len(x["mask"])):
        ratio = sum(max(x["logp"][b, t], -1e4) - max(x["ref_logp"][b, t], -1e4) for t in tokens(x["mask"], b))
        yield ratio, x["desirable"][b], x["weight"][b] if "weight" in x else 1.0


def kto(x, kl=0.3, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    z0 = max(0.0, kl)
    out = []
    for ratio, good, weight in rows(x):
        if good:
            out.append(desirable_weight * (1 - sigmoid(beta * (ratio - z0))))
        else:
            out.append(undesirable_weight * weight * (1 - sigmoid(beta * (z0 - ratio))))
    return np.array(out)


def apo_zero_unpaired(x, beta=0.1):
    return np.array([1 - sigmoid(beta * ratio) if good else sigmoid(beta * ratio) for ratio, good, _ in rows(x)])


def bco(x, delta=0.3, beta=0.1, undesirable_weight=1.0):
    out = []
    for ratio, good, weight in rows(x):
        logit = beta * ratio - delta
        out.append(softplus(-logit) if good else undesirable_weight * weight * softplus(logit))
    return np.array(out)


def udm_weights(x, low=0.5, high=10.0):
    out = []
    for p in x["weight"]:
        ratio = p / (1 - p + 1e-8)
        out.append(low if ratio < low else high if ratio > high else ratio)
    return np.array(out)


def mismatched_kl(x):
    """The mean over answers of at least one token, by the rows' weights; 0 without any."""
    total = count = 0.0
    for b, (ratio, _, weight) in enumerate(rows(x)):
        if weight and tokens(x["mask"], b):
            total, count = total + weight * ratio, count + weight
    return total / count if count else 0.0


def mean_reward(x, beta=0.1):
    """The mean over all answers, by the rows' weights."""
    weighed = [(beta * ratio, weight) for ratio, _, weight in rows(x)]
    return math.fsum(r * w for r, w in weighed if w) / math.fsum(w for _, w in weighed)
