"""P3O as loops over numbers, float64, written from the formulas; `at`: the point whose weights are constants."""

import math

import numpy as np
from references.common import tokens
from references.policy_gradient import clip

SIDES = ("chosen", "rejected")


def total(x, side, name, b):
    return sum(max(x[f"{side}_{name}"][b, t], -1e4) for t in tokens(x[f"{side}_mask"], b))


def over(x, side, name, b):
    return total(x, side, name, b) - total(x, side, "ref_logp", b)


def p3o_gap(x, kl_weight=0.1):
    gap = [x["chosen_reward"][b] - x["rejected_reward"][b] for b in range(len(x["chosen_reward"]))]
    for b in range(len(gap)):
        gap[b] -= kl_weight * (over(x, "chosen", "logp", b) - over(x, "rejected", "logp", b))
    return np.array(gap)


def weights(x, kl_weight, ratio_clip, scale):
    gap = p3o_gap(x, kl_weight)
    for b in range(len(gap)):
        moved = sum(total(x, side, "logp", b) - total(x, side, "old_logp", b) for side in SIDES)
        gap[b] *= clip(math.exp(clip(moved, -20, 20)), 1 / ratio_clip, ratio_clip) / scale
    return gap


def p3o_joint(x, at=None, kl_weight=0.1, clip=0.2, ratio_clip=10.0, scale=1.0):
    weight = weights(x if at is None else at, kl_weight, ratio_clip, scale)
    out = np.zeros(len(weight))
    for b in range(len(out)):
        now, old = (over(x, "chosen", name, b) - over(x, "rejected", name, b) for name in ("logp", "old_logp"))
        near = min(max(now, old - clip), old + clip)
        out[b] = max(-weight[b] * now, -weight[b] * near) / 2
    return out


def p3o_separate(x, at=None, kl_weight=0.1, clip=0.2, ratio_clip=10.0, scale=1.0, tokens_per_pair=None):
    weight = weights(x if at is None else at, kl_weight, ratio_clip, scale)
    out = np.zeros(len(weight))
    for b in range(len(out)):
        count = 0
        for side, w in zip(SIDES, (-weight[b], weight[b]), strict=True):
            for t in tokens(x[f"{side}_mask"], b):
                logp, old = x[f"{side}_logp"][b, t], x[f"{side}_old_logp"][b, t]
                out[b] += max(w * logp, w * min(max(logp, old - clip), old + clip))
                count += 1
        out[b] /= max(count if tokens_per_pair is None else tokens_per_pair, 1)
    return out
