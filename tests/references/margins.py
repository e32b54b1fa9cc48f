"""Pairs told how much better one side is, as loops over numbers, float64."""

import math

import numpy as np
from references.common import sigmoid, softplus
from references.preference import log_ratio


def z_of(x, b, beta):
    return beta * (log_ratio(x, "chosen", b)[0] - log_ratio(x, "rejected", b)[0])


def odpo(x, beta=0.1):
    return np.array([softplus(x["chosen_margin"][b] - z_of(x, b, beta)) for b in range(len(x["chosen_mask"]))])


def kl(a, b):
    """Of two coins whose log-odds are a and b: p (log p - log q) + (1 - p) (log (1 - p) - log (1 - q))."""
    heads = sigmoid(a) * (softplus(-b) - softplus(-a))
    return heads + sigmoid(-a) * (softplus(b) - softplus(a))


def gaps(x, beta, eta):
    for b in range(len(x["chosen_mask"])):
        yield z_of(x, b, beta), eta * (float(x["chosen_reward"][b]) - float(x["rejected_reward"][b]))


def rpo_backward_kl(x, beta=0.1, eta=1.0):
    return np.array([kl(g, z) for z, g in gaps(x, beta, eta)])


def rpo_forward_kl(x, beta=0.1, eta=1.0):
    return np.array([kl(z, g) for z, g in gaps(x, beta, eta)])


def rpo_squared(x, beta=0.1, eta=1.0):
    return np.array([math.pow(z - g, 2) for z, g in gaps(x, beta, eta)])
