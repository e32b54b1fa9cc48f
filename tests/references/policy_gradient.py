"""Policy losses as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import tokens


def ppo_clip(x, clip_low=0.2, clip_high=0.2, dual_clip=None):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            a = x["advantages"][b, t]
            ratio = math.exp(min(max(x["logp"][b, t] - x["old_logp"][b, t], -20), 20))
            surrogate = min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
            if dual_clip is not None and a < 0:
                surrogate = max(surrogate, dual_clip * a)
            out[b, t] = -surrogate
    return out


def ppo_penalty(x, kl_weight=1.0):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            log_ratio = min(max(x["logp"][b, t] - x["old_logp"][b, t], -20), 20)
            ratio = math.exp(log_ratio)
            out[b, t] = -ratio * x["advantages"][b, t] + kl_weight * (ratio - 1 - log_ratio)
    return out
