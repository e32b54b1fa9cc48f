"""Policy losses as loops over numbers, float64, written from the formulas.

`at`: the point whose ratios are constants; the same arrays as `x` but for a `logp` that has not moved.
"""

import math

import numpy as np
from references.common import sigmoid, tokens


def ratio(x, b, t):
    return math.exp(min(max(x["logp"][b, t] - x["old_logp"][b, t], -20), 20))


def clip(value, low, high):
    return min(max(value, low), high)


def each_token(formula):
    """A loss that is a formula of (x, at, b, t, hyper)."""

    def loop(x, at=None, **hyper):
        out = np.zeros(x["mask"].shape)
        for b in range(len(out)):
            for t in tokens(x["mask"], b):
                out[b, t] = formula(x, x if at is None else at, b, t, **hyper)
        return out

    return loop


@each_token
def importance_ratio(x, at, b, t):
    return ratio(x, b, t)


@each_token
def reinforce(x, at, b, t):
    return -x["advantages"][b, t] * x["logp"][b, t]


@each_token
def reinforce_is_token(x, at, b, t, cap=2.0):
    return -min(ratio(at, b, t), cap) * x["advantages"][b, t] * x["logp"][b, t]


@each_token
def cispo(x, at, b, t, ratio_max=5.0, ratio_min=0.0):
    return -clip(ratio(at, b, t), ratio_min, ratio_max) * x["advantages"][b, t] * x["logp"][b, t]


@each_token
def cispo_range(x, at, b, t, clip_low=0.2, clip_high=0.2):
    return -clip(ratio(at, b, t), 1 - clip_low, 1 + clip_high) * x["advantages"][b, t] * x["logp"][b, t]


@each_token
def sapo(x, at, b, t, tau_positive=1.0, tau_negative=1.05):
    a = x["advantages"][b, t]
    tau = tau_positive if a > 0 else tau_negative
    return -sigmoid(tau * (ratio(x, b, t) - 1)) * 4 / tau * a


@each_token
def ppo_clip(x, at, b, t, clip_low=0.2, clip_high=0.2, dual_clip=None):
    a, r = x["advantages"][b, t], ratio(x, b, t)
    surrogate = min(r * a, clip(r, 1 - clip_low, 1 + clip_high) * a)
    if dual_clip is not None and a < 0:
        surrogate = max(surrogate, dual_clip * a)
    return -surrogate


@each_token
def ppo_delta(x, at, b, t, delta=3.0):
    """TRL's two-sided clipping: the ratio itself is capped, of good and bad tokens alike."""
    a, r = x["advantages"][b, t], ratio(x, b, t)
    return max(-min(r, delta) * a, -clip(r, 0.8, 1.2) * a)


def k3_forward(x, b, t):
    d = clip(x["logp"][b, t] - x["old_logp"][b, t], -20, 20)
    return math.exp(d) - 1 - d


@each_token
def ppo_penalty(x, at, b, t, kl_weight=1.0):
    return -ratio(x, b, t) * x["advantages"][b, t] + kl_weight * k3_forward(x, b, t)


@each_token
def ppo_hybrid(x, at, b, t, clip_low=0.2, clip_high=0.2, kl_weight=1.0):
    a, r = x["advantages"][b, t], ratio(x, b, t)
    return -min(r * a, clip(r, 1 - clip_low, 1 + clip_high) * a) + kl_weight * k3_forward(x, b, t)


@each_token
def a2c(x, at, b, t, value_weight=0.5, entropy_weight=0.01):
    advantage = at["returns"][b, t] - at["values"][b, t]
    error = x["values"][b, t] - at["returns"][b, t]
    return -advantage * x["logp"][b, t] + value_weight * error**2 / 2 - entropy_weight * x["entropy"][b, t]
