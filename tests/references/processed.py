"""What a token is drawn from, in float64 by sorting: penalties, temperature, then top-k, top-p and min-p."""

import numpy as np


def penalised(logits, row, repetition_penalty=1.0, forbidden=()):
    """Logits in float64; as transformers has it, a negative score is multiplied and any other divided."""
    z = np.array(logits, np.float64)
    for token in set(row):
        z[token] = z[token] * repetition_penalty if z[token] < 0 else z[token] / repetition_penalty
    z[list(forbidden)] = -np.inf
    return z


def processed(logits, row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **penalties):
    """The log-probabilities that one row is drawn from, in float64 by sorting."""
    z = penalised(logits, row, **penalties)
    if temperature == 0:
        p = (np.arange(len(z)) == np.argmax(z)).astype(float)
    else:
        p = np.exp((z - z.max()) / temperature)
        order = np.argsort(-p, kind="stable")
        if top_k:
            p[order[top_k:]] = 0
        if top_p < 1:
            before = np.cumsum(p[order]) - p[order]
            p[order[before >= top_p * p.sum()]] = 0
        p[p < min_p * p.max()] = 0
    with np.errstate(divide="ignore"):
        return np.log(p / p.sum())
