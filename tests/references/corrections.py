"""Off-policy corrections as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import tokens


def log_ratios(x, b):
    return [x["old_logp"][b, t] - x["rollout_logp"][b, t] for t in tokens(x["mask"], b)]


def weigh(formula):
    """Weights that are a formula of (a row's log-ratios, hyper) -> the row's ratios."""

    def loop(x, **hyper):
        out = np.zeros(x["mask"].shape)
        for b in range(len(out)):
            if chosen := tokens(x["mask"], b):
                out[b, chosen] = formula(log_ratios(x, b), **hyper)
        return out

    return loop


def bounded(d):
    return math.exp(min(max(d, -20), 20))


def each(row):
    return [bounded(d) for d in row]


def whole(row):
    return [bounded(sum(row))] * len(row)


def geometric(row):
    return [bounded(sum(row) / len(row))] * len(row)


def kept(ratios, low, high):
    return [r if low <= r <= high else 0.0 for r in ratios]


token_ratio, sequence_ratio, geometric_ratio = weigh(each), weigh(whole), weigh(geometric)
truncated_is_token = weigh(lambda row, cap=2.0: [min(r, cap) for r in each(row)])
truncated_is_sequence = weigh(lambda row, cap=2.0: [min(r, cap) for r in whole(row)])
truncated_is_geometric = weigh(lambda row, cap=2.0: [min(r, cap) for r in geometric(row)])
masked_is_token = weigh(lambda row, low=0.0, high=3.0: kept(each(row), low, high))
masked_is_sequence = weigh(lambda row, low=0.0, high=3.0: kept(whole(row), low, high))
icepop = weigh(lambda row, low=0.5, high=5.0: kept(each(row), low, high))
geometric_rejection = weigh(lambda row, low=0.999, high=1.001: [float(low <= r <= high) for r in geometric(row)])


def normalised(x, mean=None):
    chosen = x["mask"] != 0
    mean = x["weights"][chosen].astype(np.float64).mean() if mean is None else mean
    return np.where(chosen, x["weights"], 0.0) / mean


def off_policy_mask(x, threshold):
    out = np.ones(len(x["mask"]))
    for b in range(len(out)):
        if chosen := tokens(x["mask"], b):
            gone = sum(x["rollout_logp"][b, t] - x["logp"][b, t] for t in chosen) / len(chosen)
            advantage = sum(x["advantages"][b, t] for t in chosen) / len(chosen)
            out[b] = 1 - (advantage < 0 and gone > threshold)
    return out
