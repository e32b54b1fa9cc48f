"""DPO with something added, as loops over numbers, float64."""

import numpy as np
from references import preference
from references.common import softplus, tokens
from references.preference import pairs, ratios


def dpop(x, beta=0.3, penalty_weight=50.0):
    return ratios(x, lambda c, r: softplus(-beta * (c - r - penalty_weight * max(0.0, -c))))


def rpo(x, beta=0.1, alpha=1.0, label_smoothing=0.0):
    out = preference.dpo(x, beta, label_smoothing)
    for b in range(len(out)):
        columns = tokens(x["chosen_mask"], b)
        out[b] -= alpha * sum(max(x["chosen_logp"][b, t], -1e4) for t in columns) / max(len(columns), 1)
    return out


def total_kl(x, side, b):
    return sum(x[f"{side}_forward_kl"][b, t] for t in tokens(x[f"{side}_mask"], b))


def tdpo1(x, beta=0.1):
    return tdpo2(x, beta, 1.0)


def tdpo2(x, beta=0.1, alpha=0.5):
    out = []
    for b, d in enumerate(pairs(x, lambda d: d)):
        difference = total_kl(x, "rejected", b) - total_kl(x, "chosen", b)
        out.append(softplus(-beta * (d - alpha * difference)))
    return np.array(out)


def mdpo(x, beta=0.1, anchor=0.0, condition_weight=1.0, anchor_weight=1.0):
    out = []
    for b, (c, r) in enumerate(ratios(x, lambda c, r: (c, r))):
        degraded = sum(
            max(x["chosen_degraded_logp"][b, t], -1e4) - max(x["chosen_degraded_ref_logp"][b, t], -1e4)
            for t in tokens(x["chosen_degraded_mask"], b)
        )
        conditional = condition_weight * softplus(-beta * (c - degraded))
        out.append(softplus(-beta * (c - r)) + conditional + anchor_weight * softplus(anchor - beta * c))
    return np.array(out)
