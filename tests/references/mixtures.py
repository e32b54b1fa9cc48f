"""Losses made of others, as loops over numbers, float64."""

import math

import numpy as np
from references import preference
from references.common import softplus, tokens
from references.preference import log_ratio


def weight(x, clamp):
    out = []
    for b in range(len(x["chosen_mask"])):
        exponent = 0.0
        for side in ("chosen", "rejected"):
            columns = tokens(x[f"{side}_mask"], b)
            terms = [max(x[f"{side}_logp"][b, t], -1e4) - x[f"{side}_log_sum_p2"][b, t] for t in columns]
            exponent += sum(terms) / max(len(columns), 1)
        out.append(min(math.exp(min(exponent, 40)), clamp))
    return np.array(out)


def wpo(x, beta=0.1, clamp=1.0, constant=None):
    """constant: where the weight is read, a copy of x that no finite difference moves."""
    return weight(constant or x, clamp) * preference.dpo(x, beta)


def mpo(x, beta=0.1, delta=0.0):
    out = 0.8 * preference.dpo(x, beta)
    for b in range(len(out)):
        chosen, rejected = beta * log_ratio(x, "chosen", b)[0], beta * log_ratio(x, "rejected", b)[0]
        out[b] += 0.2 * (softplus(delta - chosen) + softplus(rejected - delta))
    return out
