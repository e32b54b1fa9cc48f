"""The functions of generalised preference optimisation on numbers, float64, and the loss of each."""

import math

from references.common import sigmoid, softplus
from references.preference import pairs


def logistic(z):
    return softplus(-z)


def hinge(z):
    return max(0, 1 - z)


def squared(z):
    return (z - 1) ** 2


def exponential(z):
    return math.exp(-z)


def truncated_quadratic(z):
    return max(0, 1 - z) ** 2


def savage(z):
    return (1 - sigmoid(z)) ** 2


def gpo(convex):
    return lambda x, beta=0.1: pairs(x, lambda d: convex(beta * d))
