"""The losses as loops over numbers, float64, written from the formulas. Masked-out entries are never looked at."""

import math

import numpy as np


def _tokens(mask, row):
    return [t for t in range(mask.shape[1]) if mask[row, t]]


def cross_entropy(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in _tokens(x["mask"], b):
            out[b, t] = -x["logp"][b, t]
    return out


def _log_ratio(x, side, b):
    tokens = _tokens(x[f"{side}_mask"], b)
    return sum(max(x[f"{side}_logp"][b, t], -1e4) - max(x[f"{side}_ref_logp"][b, t], -1e4) for t in tokens), len(tokens)


def _softplus(x):
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def _pairs(x, of_margin):
    rows = len(x["chosen_mask"])
    return np.array([of_margin(_log_ratio(x, "chosen", b)[0] - _log_ratio(x, "rejected", b)[0]) for b in range(rows)])


def dpo(x, beta=0.1, label_smoothing=0.0):
    eps = label_smoothing
    return _pairs(x, lambda d: (1 - eps) * _softplus(-beta * d) + eps * _softplus(beta * d))


def ipo(x, beta=0.1):
    return _pairs(x, lambda d: (d - 1 / (2 * beta)) ** 2)


def ipo_average(x, beta=0.1):
    out = []
    for b in range(len(x["chosen_mask"])):
        (chosen, chosen_length), (rejected, rejected_length) = _log_ratio(x, "chosen", b), _log_ratio(x, "rejected", b)
        d = chosen / max(chosen_length, 1) - rejected / max(rejected_length, 1)
        out.append((d - 1 / (2 * beta)) ** 2)
    return np.array(out)


def ppo_clip(x, clip_low=0.2, clip_high=0.2, dual_clip=None):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in _tokens(x["mask"], b):
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
        for t in _tokens(x["mask"], b):
            log_ratio = min(max(x["logp"][b, t] - x["old_logp"][b, t], -20), 20)
            ratio = math.exp(log_ratio)
            out[b, t] = -ratio * x["advantages"][b, t] + kl_weight * (ratio - 1 - log_ratio)
    return out


def value_clip(x, clip=0.2):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in _tokens(x["mask"], b):
            value, old, target = (x[name][b, t] for name in ("values", "old_values", "returns"))
            near = min(max(value, old - clip), old + clip)
            out[b, t] = max((value - target) ** 2, (near - target) ** 2) / 2
    return out


def bradley_terry(x, margin=None, preference=None):
    out = []
    for b in range(len(x["chosen"])):
        m = x["margin"][b] if "margin" in x else margin or 0.0
        p = x["preference"][b] if "preference" in x else 1.0 if preference is None else preference
        d = x["chosen"][b] - x["rejected"][b] - m
        out.append(p * _softplus(-d) + (1 - p) * _softplus(d))
    return np.array(out)


def reward_centering(x):
    return np.array([(chosen + rejected) ** 2 for chosen, rejected in zip(x["chosen"], x["rejected"], strict=True)])


def full_kl(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in _tokens(x["mask"], b):
            p, q = ([math.exp(logit) for logit in (x[name][b, t], 0.0, 0.5)] for name in ("logits", "ref_logits"))
            out[b, t] = sum(a / sum(p) * math.log(a / sum(p) / (c / sum(q))) for a, c in zip(p, q, strict=True))
    return out


def _divergence(x, of_difference):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in _tokens(x["mask"], b):
            out[b, t] = of_difference(x["logp"][b, t] - x["ref_logp"][b, t])
    return out


def k1(x):
    return _divergence(x, lambda d: d)


def k2(x):
    return _divergence(x, lambda d: d * d / 2)


def k3(x):
    return _divergence(x, lambda d: math.exp(-min(max(d, -20), 20)) - 1 + min(max(d, -20), 20))


def k3_forward(x):
    return _divergence(x, lambda d: math.exp(min(max(d, -20), 20)) - 1 - min(max(d, -20), 20))


def absolute(x):
    return _divergence(x, abs)
