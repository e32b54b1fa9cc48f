"""Losses of process reward models as loops over numbers, float64, written from the formulas."""

from references.preference_model import likelihood
from references.supervised import per_token


def process_reward(x):
    return per_token(x, lambda b, t: likelihood(x["logits"][b, t], x["labels"][b, t]))
