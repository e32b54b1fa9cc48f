"""DPO told about lengths, as loops over numbers, float64."""

import numpy as np
from references.common import softplus, tokens
from references.preference import log_ratio


def r_dpo(x, beta=0.1, alpha=0.01):
    out = []
    for b in range(len(x["chosen_mask"])):
        (chosen, longer), (rejected, shorter) = log_ratio(x, "chosen", b), log_ratio(x, "rejected", b)
        out.append(softplus(-(beta * (chosen - rejected) + alpha * (longer - shorter))))
    return np.array(out)


def dpo_average(x, beta=5.0):
    out = []
    for b in range(len(x["chosen_mask"])):
        (chosen, n), (rejected, m) = log_ratio(x, "chosen", b), log_ratio(x, "rejected", b)
        out.append(softplus(-beta * (chosen / max(n, 1) - rejected / max(m, 1))))
    return np.array(out)


def cut(x, side, which, b, alpha):
    """log p of one side, its tokens past the other side's length weighted by alpha."""
    columns = tokens(x[f"{side}_mask"], b)
    other = {"chosen": "rejected", "rejected": "chosen"}[side]
    shortest = min(len(columns), len(tokens(x[f"{other}_mask"], b)))
    return sum((1 if i < shortest else alpha) * max(x[f"{side}_{which}"][b, t], -1e4) for i, t in enumerate(columns))


def ld_dpo(x, beta=0.1, alpha=0.5, ref_alpha=None):
    ref_alpha, out = alpha if ref_alpha is None else ref_alpha, []
    for b in range(len(x["chosen_mask"])):
        policy = cut(x, "chosen", "logp", b, alpha) - cut(x, "rejected", "logp", b, alpha)
        reference = cut(x, "chosen", "ref_logp", b, ref_alpha) - cut(x, "rejected", "ref_logp", b, ref_alpha)
        out.append(softplus(-beta * (policy - reference)))
    return np.array(out)


def ld_dpo_policy(x, beta=0.1, alpha=0.5):
    return ld_dpo(x, beta, alpha, ref_alpha=1.0)
