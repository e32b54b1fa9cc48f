"""Losses over pairs as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import softplus, tokens


def log_ratio(x, side, b):
    columns = tokens(x[f"{side}_mask"], b)
    return sum(max(x[f"{side}_logp"][b, t], -1e4) - max(x[f"{side}_ref_logp"][b, t], -1e4) for t in columns), len(
        columns
    )


def pairs(x, of_margin):
    rows = len(x["chosen_mask"])
    return np.array([of_margin(log_ratio(x, "chosen", b)[0] - log_ratio(x, "rejected", b)[0]) for b in range(rows)])


def dpo(x, beta=0.1, label_smoothing=0.0):
    eps = label_smoothing
    return pairs(x, lambda d: (1 - eps) * softplus(-beta * d) + eps * softplus(beta * d))


def ipo(x, beta=0.1):
    return pairs(x, lambda d: (d - 1 / (2 * beta)) ** 2)


def ipo_average(x, beta=0.1):
    out = []
    for b in range(len(x["chosen_mask"])):
        (chosen, chosen_length), (rejected, rejected_length) = log_ratio(x, "chosen", b), log_ratio(x, "rejected", b)
        d = chosen / max(chosen_length, 1) - rejected / max(rejected_length, 1)
        out.append((d - 1 / (2 * beta)) ** 2)
    return np.array(out)
