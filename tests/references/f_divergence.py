"""f'(u) of the divergences at u = e^x, less f'(1), and DPO with them: loops over numbers, float64."""

import math

from references.common import softplus
from references.preference import ratios


def reverse_kl(x):
    return math.log(math.exp(x))


def forward_kl(x):
    return 1 - 1 / math.exp(x)


def jensen_shannon(x):
    u = math.exp(x)
    return math.log(2 * u / (1 + u))


def alpha(x, alpha=0.5):
    return (1 - math.exp(x) ** -alpha) / alpha if alpha else x


def dpo(score):
    """DPO's loss with the log-ratios replaced by score(x)."""

    def loss(x, beta=0.1, **hyper):
        return ratios(x, lambda c, r: softplus(-beta * (score(c, **hyper) - score(r, **hyper))))

    return loss
