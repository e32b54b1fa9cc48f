"""Pairs without a reference, as loops over numbers, float64."""

import math

import numpy as np
from references.common import softplus, tokens


def total(x, side, b):
    columns = tokens(x[f"{side}_mask"], b)
    return sum(max(x[f"{side}_logp"][b, t], -1e4) for t in columns), max(len(columns), 1)


def average(x, side, b):
    return total(x, side, b)[0] / total(x, side, b)[1]


def smoothed(z, eps):
    return (1 - eps) * softplus(-z) + eps * softplus(z)


def rows(x):
    return range(len(x["chosen_mask"]))


def cpo(x, beta=0.1, label_smoothing=0.0):
    return np.array(
        [smoothed(beta * (total(x, "chosen", b)[0] - total(x, "rejected", b)[0]), label_smoothing) for b in rows(x)]
    )


def slic_hf(x, delta=1.0, target_weight=0.1):
    out = []
    for b in rows(x):
        chosen, rejected = total(x, "chosen", b)[0], total(x, "rejected", b)[0]
        target = max(x["chosen_target_logp"][b], -1e4) if "chosen_target_logp" in x else chosen
        out.append(max(0.0, delta - chosen + rejected) - target_weight * target)
    return np.array(out)


def simpo(x, beta=2.0, gamma=0.5, label_smoothing=0.0):
    return np.array(
        [
            smoothed(beta * (average(x, "chosen", b) - average(x, "rejected", b)) - gamma, label_smoothing)
            for b in rows(x)
        ]
    )


def simpo_ratio(x, beta=2.0, gamma_beta_ratio=0.25, label_smoothing=0.0):
    return simpo(x, beta, gamma_beta_ratio * beta, label_smoothing)


def simpo_hinge(x, beta=2.0, gamma=0.5):
    return np.array(
        [max(0.0, 1 - beta * (average(x, "chosen", b) - average(x, "rejected", b)) + gamma) for b in rows(x)]
    )


def alphapo(x, beta=2.5, gamma=0.1, alpha=0.25):
    def reward(a):
        return (1 - math.exp(min(-alpha * a, 80))) / alpha

    return np.array(
        [
            softplus(gamma - beta * (reward(average(x, "chosen", b)) - reward(average(x, "rejected", b))))
            for b in rows(x)
        ]
    )


def orpo(x, odds_weight=0.1):
    def log_odds(a):
        return a - math.log(-math.expm1(min(a, -1e-6)))

    return np.array(
        [
            odds_weight * softplus(log_odds(average(x, "rejected", b)) - log_odds(average(x, "chosen", b)))
            for b in rows(x)
        ]
    )
