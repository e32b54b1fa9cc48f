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


def pmp(x, mu=1.0):
    rows = zip(x["good"], x["bad"], x["good_nll"], strict=True)
    return np.array([softplus(bad - good) + mu * nll for good, bad, nll in rows])


def rated(x, loss):
    """loss(score, target) wherever there is a rating."""
    out = np.zeros(x["scores"].shape)
    for i in np.ndindex(out.shape):
        if "mask" not in x or x["mask"][i]:
            out[i] = loss(x["scores"][i], x["targets"][i])
    return out


def reward_mse(x):
    return rated(x, lambda score, target: (score - target) ** 2)


def reward_huber(x, delta=1.0):
    def loss(score, target):
        error = abs(score - target)
        return error**2 / 2 if error <= delta else delta * (error - delta / 2)

    return rated(x, loss)


def reward_binary(x):
    return rated(x, lambda score, p: p * softplus(-score) + (1 - p) * softplus(score))
