"""Losses over K candidates as loops over numbers, float64, written from the formulas."""

import math

import numpy as np
from references.common import softplus, tokens


def log_softmax(values):
    largest = max(values)
    total = largest + math.log(sum(math.exp(v - largest) for v in values))
    return [v - total for v in values]


def kwise(x):
    out = []
    for b, columns in candidates(x):
        pairs = [(i, j) for i in columns for j in columns if x["ranks"][b, i] < x["ranks"][b, j]]
        costs = [softplus(x["scores"][b, j] - x["scores"][b, i]) for i, j in pairs]
        out.append(sum(costs) / max(len(costs), 1))
    return np.array(out)


def plackett_luce(x, top=None, beta=1.0):
    """Chosen one after the other, the best first; where ranks are tied, each from all that are not above it."""
    out = []
    for b, columns in candidates(x):
        cost = 0.0
        for k in columns:
            above = [j for j in columns if x["ranks"][b, j] < x["ranks"][b, k]]
            if top is None or len(above) < top:
                rest = [j for j in columns if j not in above]
                cost -= log_softmax([beta * x["scores"][b, j] for j in rest])[rest.index(k)]
        out.append(cost)
    return np.array(out)


def best_of_k(x):
    out = []
    for b, columns in candidates(x):
        known = x["best"][b] in columns
        out.append(-log_softmax([x["scores"][b, j] for j in columns])[columns.index(x["best"][b])] if known else 0.0)
    return np.array(out)


def plackett_luce_dpo(x, beta=0.1, top=None):
    return plackett_luce(x, top, beta)


def targets(x, beta, temperature):
    for b, columns in candidates(x):
        logits = [beta * x["scores"][b, k] for k in columns]
        yield logits, log_softmax([x["rewards"][b, k] / temperature for k in columns]) if columns else []


def infonca(x, beta=0.01, temperature=1.0):
    return np.array(
        [
            -sum(math.exp(w) * q for w, q in zip(target, log_softmax(logits), strict=True)) if logits else 0.0
            for logits, target in targets(x, beta, temperature)
        ]
    )


def nca(x, beta=0.01, temperature=1.0):
    out = []
    for logits, target in targets(x, beta, temperature):
        rewarded = sum(math.exp(w) * softplus(-r) for w, r in zip(target, logits, strict=True))
        out.append(rewarded + sum(softplus(r) for r in logits) / max(len(logits), 1))
    return np.array(out)


def exo_reward(x, beta=0.1, reward_temperature=1.0):
    out = []
    for logits, target in targets(x, beta, reward_temperature):
        policy = log_softmax(logits) if logits else []
        out.append(sum(math.exp(q) * (q - p) for q, p in zip(policy, target, strict=True)))
    return np.array(out)


def candidates(x):
    """Of every prompt: its number and the columns of its candidates."""
    return [(b, tokens(x["valid"], b)) for b in range(len(x["valid"]))]
