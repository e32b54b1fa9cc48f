"""KL estimators as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import tokens


def per_token(x, of_difference):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            out[b, t] = of_difference(x["logp"][b, t] - x["ref_logp"][b, t])
    return out


def k1(x):
    return per_token(x, lambda d: d)


def k2(x):
    return per_token(x, lambda d: d * d / 2)


def k3(x):
    return per_token(x, lambda d: math.exp(-min(max(d, -20), 20)) - 1 + min(max(d, -20), 20))


def k3_capped(x, cap=10.0):
    return np.minimum(k3(x), cap)


def k3_forward(x):
    return per_token(x, lambda d: math.exp(min(max(d, -20), 20)) - 1 - min(max(d, -20), 20))


def absolute(x):
    return per_token(x, abs)


def entropy(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            p = [math.exp(z - max(x["logits"][b, t])) for z in x["logits"][b, t]]
            out[b, t] = -sum(a / sum(p) * math.log(a / sum(p)) for a in p)
    return out


def full_kl(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            p, q = ([math.exp(z - max(x[name][b, t])) for z in x[name][b, t]] for name in ("logits", "ref_logits"))
            out[b, t] = sum(a / sum(p) * math.log(a / sum(p) / (c / sum(q))) for a, c in zip(p, q, strict=True))
    return out
