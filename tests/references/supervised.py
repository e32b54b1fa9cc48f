"""Supervised objectives as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import tokens


def per_token(x, loss):
    """loss(b, t) at every token that counts, 0 elsewhere."""
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            out[b, t] = loss(b, t)
    return out


def cross_entropy(x):
    return per_token(x, lambda b, t: -x["logp"][b, t])


def smoothed_cross_entropy(x, label_smoothing=0.1):
    def loss(b, t):
        return -(1 - label_smoothing) * x["logp"][b, t] - label_smoothing * x["mean_logp"][b, t]

    return per_token(x, loss)


def dft(x):
    return per_token(x, lambda b, t: -min(math.exp(min(x["logp"][b, t], 0)), 1) * x["logp"][b, t])


def z_loss(x):
    return per_token(x, lambda b, t: x["log_normalizer"][b, t] ** 2)


def dft_potential(x):
    """Its gradient is the one DFT has: d/dz -e^z = -e^z, and of a positive log-probability, which is none, -1."""
    return per_token(x, lambda b, t: -math.exp(z) if (z := x["logp"][b, t]) < 0 else -1 - z)
