"""Beta-DPO as loops over numbers, float64."""

import math

import numpy as np
from references.common import softplus
from references.preference import pairs


def beta_dpo(x, gap_mean=0.4, selected_mean=0.7, beta=0.1, alpha=0.6):
    used = max(1e-3, beta * (1 + alpha * (selected_mean - gap_mean)))
    return pairs(x, lambda d: softplus(-used * d))


def beta_dpo_moments(x, mean=0.0, std=0.0, momentum=0.9):
    count = sum(x["weights"])
    average = sum(w * d for w, d in zip(x["weights"], x["gaps"], strict=True)) / count
    squares = sum(w * (d - average) ** 2 for w, d in zip(x["weights"], x["gaps"], strict=True))
    spread = math.sqrt(squares / (count - 1)) if count > 1 else 0.0
    return np.array([momentum * mean + (1 - momentum) * average, momentum * std + (1 - momentum) * spread])
