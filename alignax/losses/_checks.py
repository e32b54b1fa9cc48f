"""Refusals of numbers that mean nothing, where they are known before the program runs."""

from collections.abc import Callable

import numpy as np
from jax.core import Tracer

from alignax.types import Array, Scalar


def check(
    function: str, name: str, x: Array | Scalar | bool, holds: Callable[[np.ndarray], np.ndarray], expected: str
) -> None:
    """Refuses numbers of which `holds` is not true, NaN among them; what is traced gets through.

    Raises:
      ValueError: naming the function, the argument, the first number refused and what was expected.
    """
    if isinstance(x, Tracer):
        return
    values = np.asarray(x, np.float64).reshape(-1)  # numpy's: jax would trace the comparison inside jit
    refused = values[~holds(values)]
    if refused.size:
        raise ValueError(f"{function}: {name}={refused[0]:g}; expected {expected}")


def check_positive(function: str, **values: Array | Scalar) -> None:
    """Refuses known numbers that are not above 0."""
    for name, x in values.items():
        check(function, name, x, lambda x: x > 0, f"{name} > 0")


def check_label_smoothing(function: str, label_smoothing: Array | Scalar) -> None:
    """Refuses a known probability of a wrong label outside [0, 0.5): from a half on, labels say nothing."""
    expected = "0 <= label_smoothing < 0.5"
    check(function, "label_smoothing", label_smoothing, lambda x: (0 <= x) & (x < 0.5), expected)
