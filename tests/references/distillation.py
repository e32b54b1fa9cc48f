"""Distillation losses as loops over numbers, float64, written from the formulas."""

import math

from references.supervised import per_token


def log_softmax(logits, temperature=1.0):
    scaled = [float(z) / temperature for z in logits]
    top = max(scaled)
    normaliser = top + math.log(sum(math.exp(z - top) for z in scaled))
    return [z - normaliser for z in scaled]


def kl(p, q):
    """KL of two lists of log-probabilities."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


def both(x, b, t, temperature=1.0):
    """Log-probabilities of teacher and student."""
    return tuple(log_softmax(x[name][b, t], temperature) for name in ("teacher_logits", "logits"))


def distill_forward_kl(x):
    return per_token(x, lambda b, t: kl(*both(x, b, t)))


def distill_reverse_kl(x):
    return per_token(x, lambda b, t: kl(*reversed(both(x, b, t))))


def generalised_jsd(x, beta=0.5, temperature=1.0):
    def loss(b, t):
        p, q = both(x, b, t, temperature)
        if beta in (0, 1):
            return kl(q, p) if beta else kl(p, q)
        mixture = [math.log(beta * math.exp(a) + (1 - beta) * math.exp(c)) for a, c in zip(p, q, strict=True)]
        return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)

    return per_token(x, loss)


def rest(p):
    """Log-probability of all that a list of log-probabilities leaves out, at least 1e-7."""
    return math.log(max(1 - sum(math.exp(a) for a in p), 1e-7))


def distill_top_k(x):
    def loss(b, t):
        q = log_softmax(x["logits"][b, t])
        p, known = list(map(float, x["teacher_logp"][b, t])), [q[i] for i in x["teacher_ids"][b, t]]
        return kl([*p, rest(p)], [*known, rest(known)])

    return per_token(x, loss)


def distill_top_k_renormalised(x):
    def loss(b, t):
        known = [x["logits"][b, t][i] for i in x["teacher_ids"][b, t]]
        return kl(log_softmax(x["teacher_logp"][b, t]), log_softmax(known))

    return per_token(x, loss)
