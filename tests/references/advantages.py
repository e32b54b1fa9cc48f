"""Loops over numbers, from the formulas: NaN rewards are deleted first, masked-out tokens never looked at."""

import math

import numpy as np
from references.common import tokens


def mean(x):
    """Of a list; 0 of none."""
    return sum(x) / len(x) if x else 0.0


def std(x, ddof):
    """Of a list; 0 where there are too few."""
    return math.sqrt(sum((a - mean(x)) ** 2 for a in x) / (len(x) - ddof)) if len(x) > ddof else 0.0


def there(x):
    """The numbers among them."""
    return [float(a) for a in np.ravel(x) if not math.isnan(a)]


def _each(rewards, advantage):
    out = np.zeros(np.shape(rewards))
    for b, g in np.ndindex(out.shape):
        if not math.isnan(rewards[b, g]):
            out[b, g] = advantage(b, g)
    return out


def group_relative(x, eps=1e-4, ddof=1):
    r = x["rewards"]
    return _each(r, lambda b, g: (r[b, g] - mean(there(r[b]))) / (std(there(r[b]), ddof) + eps))


def group_relative_batch(x, eps=1e-4, ddof=1):
    r = x["rewards"]
    return _each(r, lambda b, g: (r[b, g] - mean(there(r[b]))) / (std(there(r), ddof) + eps))


def group_centred(x):
    r = x["rewards"]
    return _each(r, lambda b, g: r[b, g] - mean(there(r[b])))


def leave_one_out(x):
    r = x["rewards"]

    def advantage(b, g):
        others = there(np.delete(r[b], g))
        return r[b, g] - mean(others) if others else 0.0

    return _each(r, advantage)


def opo(x):
    r, lengths = x["rewards"], x["lengths"]

    def advantage(b, g):
        pairs = [(length, a) for length, a in zip(lengths[b], r[b]) if not math.isnan(a)]
        return r[b, g] - sum(length * a for length, a in pairs) / sum(length for length, _ in pairs)

    return _each(r, advantage)


def _summed(r, weights):
    total = np.full(r.shape[:2], np.nan)
    for b, g in np.ndindex(total.shape):
        parts = [(w, a) for w, a in zip(weights, r[b, g]) if not math.isnan(a)]
        if parts:
            total[b, g] = sum(w * a for w, a in parts)
    return total


def multi_reward_sum(x, weights, eps=1e-4, ddof=1):
    return group_relative({"rewards": _summed(x["rewards"], weights)}, eps, ddof)


def multi_reward_normalised(x, weights, eps=1e-4, ddof=1):
    r = x["rewards"]
    each = np.stack([group_relative({"rewards": r[:, :, k]}, eps, ddof) for k in range(r.shape[2])], axis=2)
    total = _summed(np.where(np.isnan(r), np.nan, each), weights)
    return _each(total, lambda b, g: (total[b, g] - mean(there(total))) / (std(there(total), ddof) + eps))


def group_relative_process(x, eps=1e-4, ddof=1):
    r, ends, mask = x["rewards"], x["ends"], x["mask"]
    out = np.zeros(mask.shape)
    for b, g, t in np.ndindex(mask.shape):
        steps = [a for a, end in zip(r[b, g], ends[b, g]) if end >= t and not math.isnan(a)]
        if mask[b, g, t]:
            out[b, g, t] = sum((a - mean(there(r[b]))) / (std(there(r[b]), ddof) + eps) for a in steps)
    return out


def remax(x):
    out = np.zeros(x["mask"].shape)
    for b in range(len(out)):
        for t in tokens(x["mask"], b):
            out[b, t] = sum(x["rewards"][b, s] for s in tokens(x["mask"], b) if s >= t) - x["baseline"][b]
    return out


def _whitened(values, ddof, eps):
    """values: index -> number."""
    numbers = list(values.values())
    centre, variance = mean(numbers), std(numbers, ddof) ** 2
    return {index: (value - centre) / math.sqrt(variance + eps) for index, value in values.items()}


def reinforce_plus_plus(x, gamma=1.0, ddof=1, eps=1e-8):
    out, values = np.zeros(x["mask"].shape), {}
    for b in range(len(out)):
        ahead = 0.0
        for t in reversed(tokens(x["mask"], b)):
            ahead = values[b, t] = x["rewards"][b, t] + gamma * ahead
    for index, value in _whitened(values, ddof, eps).items():
        out[index] = value
    return out


def reinforce_plus_plus_baseline(x, ddof=1, eps=1e-8):
    out, centred = np.zeros(x["mask"].shape), group_centred(x)
    values = {i: centred[i[:2]] for i in np.ndindex(out.shape) if x["mask"][i] and not math.isnan(x["rewards"][i[:2]])}
    for index, value in _whitened(values, ddof, eps).items():
        out[index] = value
    return out
