"""Losses of each side's own log-ratio as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import sigmoid, softplus
from references.preference import log_ratio, ratios


def apo_zero(x, beta=0.1):
    return ratios(x, lambda c, r: (1 - sigmoid(beta * c)) + sigmoid(beta * r))


def apo_down(x, beta=0.1):
    return ratios(x, lambda c, r: sigmoid(beta * c) + (1 - sigmoid(beta * (c - r))))


def nca_pair(x, beta=0.01):
    return ratios(x, lambda c, r: softplus(-beta * c) + 0.5 * softplus(beta * c) + 0.5 * softplus(beta * r))


def bco_pair(x, beta=0.1, delta=0.0):
    return ratios(x, lambda c, r: softplus(-(beta * c - delta)) + softplus(beta * r - delta))


def kto_pair(x, beta=0.1, *, kl_chosen, kl_rejected):
    kl_chosen, kl_rejected = max(0, kl_chosen), max(0, kl_rejected)

    def mean(c, r):
        return ((1 - sigmoid(beta * (c - kl_rejected))) + (1 - sigmoid(beta * (kl_chosen - r)))) / 2

    return ratios(x, mean)


def sppo(x, beta=1e-3):
    out = []
    for b in range(len(x["chosen_mask"])):
        terms = [
            (log_ratio(x, side, b)[0] - (x[f"{side}_win_rate"][b] - 0.5) / beta) ** 2 for side in ("chosen", "rejected")
        ]
        out.append(0.5 * sum(terms))
    return np.array(out)


def sppo_hard(x, beta=1e-3):
    return ratios(x, lambda c, r: (c - 1 / (2 * beta)) ** 2 + (r + 1 / (2 * beta)) ** 2)
