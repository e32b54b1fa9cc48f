"""Diffusion-DPO as loops over numbers, float64."""

import numpy as np
from references.common import softplus


def diffusion_dpo(x, beta=5000.0):
    out = []
    for b in range(len(x["chosen"])):
        gap = (
            float(x["chosen"][b]) - float(x["rejected"][b]) - (float(x["ref_chosen"][b]) - float(x["ref_rejected"][b]))
        )
        out.append(softplus(beta / 2 * gap))
    return np.array(out)


def squared_error(x):
    out = []
    for prediction, target in zip(x["prediction"], x["target"], strict=True):
        errors = [(float(p) - float(t)) ** 2 for p, t in zip(prediction, target, strict=True)]
        out.append(sum(errors) / len(errors))
    return np.array(out)
