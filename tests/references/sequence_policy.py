"""Policy losses of whole responses as loops over numbers, float64, written from the formulas; `at` as beside this."""

import math

import numpy as np
from references.common import tokens
from references.policy_gradient import clip


def each_row(formula):
    """A loss that is a formula of (row's log-ratios, its advantages, hyper), the same on every token of the row."""

    def loop(x, **hyper):
        out = np.zeros(x["mask"].shape)
        for b in range(len(out)):
            if chosen := tokens(x["mask"], b):
                moved = [x["logp"][b, t] - x["old_logp"][b, t] for t in chosen]
                out[b, chosen] = formula(moved, sum(x["advantages"][b, t] for t in chosen) / len(chosen), **hyper)
        return out

    return loop


def clipped(ratio, a, clip_low, clip_high):
    return -min(ratio * a, clip(ratio, 1 - clip_low, 1 + clip_high) * a)


def mean_ratio(moved):
    return math.exp(clip(sum(moved) / len(moved), -20, 10))


@each_row
def rloo(moved, a, clip_low=0.2, clip_high=0.2):
    return clipped(math.exp(clip(sum(moved), -20, 20)), a, clip_low, clip_high)


@each_row
def gspo(moved, a, clip_low=3e-4, clip_high=4e-4):
    return clipped(mean_ratio(moved), a, clip_low, clip_high)


@each_row
def luspo(moved, a, clip_low=2e-3, clip_high=2.5e-3):
    return len(moved) * clipped(mean_ratio(moved), a, clip_low, clip_high)


@each_row
def gmpo(moved, a, clip_low=0.4, clip_high=0.4):
    near = [clip(d, -clip_low, clip_high) for d in moved]
    kept = [min(d, c) if a > 0 else max(d, c) for d, c in zip(moved, near, strict=True)]
    return -math.exp(clip(sum(kept) / len(kept), -20, 20)) * a


def each_token(formula):
    """A loss that is a formula of (x, at, b, t, the row's tokens, hyper)."""

    def loop(x, at=None, **hyper):
        out = np.zeros(x["mask"].shape)
        for b in range(len(out)):
            for t in (chosen := tokens(x["mask"], b)):
                out[b, t] = formula(x, x if at is None else at, b, t, chosen, **hyper)
        return out

    return loop


def moved(x, b, chosen):
    return [x["logp"][b, t] - x["old_logp"][b, t] for t in chosen]


@each_token
def reinforce_is_sequence(x, at, b, t, chosen, cap=2.0):
    weight = min(math.exp(clip(sum(moved(at, b, chosen)), -20, 20)), cap)
    return -weight * x["advantages"][b, t] * x["logp"][b, t]


@each_token
def gspo_token(x, at, b, t, chosen, clip_low=3e-4, clip_high=4e-4):
    ratio = mean_ratio(moved(at, b, chosen)) * math.exp(x["logp"][b, t] - at["logp"][b, t])
    return clipped(ratio, x["advantages"][b, t], clip_low, clip_high)


@each_token
def vespo(x, at, b, t, chosen, power_positive=2.0, decay_positive=3.0, power_negative=3.0, decay_negative=2.0):
    a = sum(x["advantages"][b, s] for s in chosen) / len(chosen)
    power, decay = (power_positive, decay_positive) if a >= 0 else (power_negative, decay_negative)
    ratio = math.exp(clip(sum(moved(at, b, chosen)), -20, 20))
    return -math.exp(decay) * ratio**power * math.exp(-decay * ratio) * a * x["logp"][b, t]
