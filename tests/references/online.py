"""Losses of self-play as loops over numbers, float64, written from the formulas."""

import numpy as np
from references.common import softplus, tokens
from references.preference import log_ratio


def margins(x):
    rows = range(len(x["chosen_mask"]))
    return [log_ratio(x, "chosen", b)[0] - log_ratio(x, "rejected", b)[0] for b in rows]


def dpo_soft(x, beta=0.1):
    preference = x["chosen_preference"]
    return np.array([p * softplus(-beta * d) + (1 - p) * softplus(beta * d) for d, p in zip(margins(x), preference)])


def ipo_soft(x, beta=0.1):
    return np.array([(d - (p - 0.5) / beta) ** 2 for d, p in zip(margins(x), x["chosen_preference"])])


def xpo(x, beta=0.1, alpha=1e-5):
    out = []
    for b, d in enumerate(margins(x)):
        side = "chosen" if x["chosen_from_reference"][b] else "rejected"
        log_prob = sum(max(x[f"{side}_logp"][b, t], -1e4) for t in tokens(x[f"{side}_mask"], b))
        out.append(softplus(-beta * d) + alpha * log_prob)
    return np.array(out)


def nash_md(x, kl_weight=0.1, answers_for=lambda s, t: s >= t, weights_from=None):
    """`weights_from`: the arrays of which the constants are made, when they are other ones than x."""
    held, out = x if weights_from is None else weights_from, np.zeros(x["mask"].shape)
    for b in range(len(out)):
        columns = tokens(x["mask"], b)
        for t in columns:
            kl = sum(held["logp"][b, s] - held["ref_logp"][b, s] for s in columns if answers_for(s, t))
            out[b, t] = -(held["preference"][b] - 0.5 - kl_weight * kl) * x["logp"][b, t]
    return out


def nash_md_sequence(x, kl_weight=0.1, weights_from=None):
    return nash_md(x, kl_weight, lambda s, t: True, weights_from)


def nash_md_trl(x, kl_weight=0.1, weights_from=None):
    return nash_md(x, kl_weight, lambda s, t: s == t, weights_from)
