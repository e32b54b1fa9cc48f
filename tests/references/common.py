"""What the loops over numbers share: masked-out entries are never looked at."""

import math


def tokens(mask, row):
    """The columns of a row that count."""
    return [t for t in range(mask.shape[1]) if mask[row, t]]


def softplus(x):
    """log(1 + e^x)."""
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
