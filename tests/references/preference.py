"""Losses of a pair's margin as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import sigmoid, softplus, tokens


def log_ratio(x, side, b):
    columns = tokens(x[f"{side}_mask"], b)
    return sum(max(x[f"{side}_logp"][b, t], -1e4) - max(x[f"{side}_ref_logp"][b, t], -1e4) for t in columns), len(
        columns
    )


def ratios(x, of_ratios):
    """of_ratios(x_chosen, x_rejected) of every row."""
    rows = range(len(x["chosen_mask"]))
    return np.array([of_ratios(log_ratio(x, "chosen", b)[0], log_ratio(x, "rejected", b)[0]) for b in rows])


def pairs(x, of_margin):
    """of_margin(D) of every row."""
    return ratios(x, lambda chosen, rejected: of_margin(chosen - rejected))


def dpo(x, beta=0.1, label_smoothing=0.0):
    eps = label_smoothing
    return pairs(x, lambda d: (1 - eps) * softplus(-beta * d) + eps * softplus(beta * d))


def robust_dpo(x, beta=0.1, label_smoothing=0.1):
    eps = label_smoothing
    return pairs(x, lambda d: ((1 - eps) * softplus(-beta * d) - eps * softplus(beta * d)) / (1 - 2 * eps))


def hinge(x, beta=0.05):
    return pairs(x, lambda d: max(0, 1 - beta * d))


def ipo(x, beta=0.1):
    return pairs(x, lambda d: (d - 1 / (2 * beta)) ** 2)


def ipo_average(x, beta=0.1):
    out = []
    for b in range(len(x["chosen_mask"])):
        (chosen, chosen_length), (rejected, rejected_length) = log_ratio(x, "chosen", b), log_ratio(x, "rejected", b)
        d = chosen / max(chosen_length, 1) - rejected / max(rejected_length, 1)
        out.append((d - 1 / (2 * beta)) ** 2)
    return np.array(out)


def exo_pair(x, beta=0.1, label_smoothing=1e-3):
    eps = label_smoothing

    def kl(d):
        q = sigmoid(beta * d)
        return q * math.log(q / (1 - eps)) + (1 - q) * math.log((1 - q) / eps)

    return pairs(x, kl)


def exo_official(x, beta=0.1, log_epsilon=-10.0):
    def mean(d):
        q = sigmoid(beta * d)
        return q * math.log(q) + (1 - q) * (math.log(1 - q) - log_epsilon)

    return pairs(x, mean)


def discopop(x, beta=0.05, tau=0.05):
    def blend(d):
        m = sigmoid(beta * d / tau)
        return (1 - m) * softplus(-beta * d) + m * math.exp(-beta * d)

    return pairs(x, blend)
