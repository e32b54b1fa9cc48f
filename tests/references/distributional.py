"""Losses of quantiles as loops over numbers, float64: the row with the k-th value has the loss of the k-th quantile."""

import numpy as np
from references.common import softplus, tokens
from references.preference import log_ratio


def total(x, name, b):
    return sum(max(x[f"{name}_logp"][b, t], -1e4) for t in tokens(x[name.removesuffix("_ref") + "_mask"], b))


def dominance(upper, lower, weights, beta, label_smoothing):
    out, eps = np.zeros(len(upper)), label_smoothing
    rows = [b for b in range(len(upper)) if weights is None or weights[b] != 0]
    for b, low in zip(sorted(rows, key=lambda b: upper[b]), sorted(lower[b] for b in rows)):
        d = upper[b] - low
        out[b] = (1 - eps) * softplus(-beta * d) + eps * softplus(beta * d)
    return out


def aot(x, beta=0.01, label_smoothing=0.0):
    margin, ref_margin = (
        [total(x, f"chosen{ref}", b) - total(x, f"rejected{ref}", b) for b in range(len(x["chosen_mask"]))]
        for ref in ("", "_ref")
    )
    return dominance(margin, ref_margin, x.get("weights"), beta, label_smoothing)


def aot_unpaired(x, beta=0.01, label_smoothing=0.0):
    chosen, rejected = (
        [log_ratio(x, side, b)[0] for b in range(len(x["chosen_mask"]))] for side in ("chosen", "rejected")
    )
    return dominance(chosen, rejected, x.get("weights"), beta, label_smoothing)
