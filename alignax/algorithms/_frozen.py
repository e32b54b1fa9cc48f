"""Weights that an algorithm reads and does not train."""

from typing import Any

import jax

from alignax.types import Params


def frozen_params(frozen: Any, name: str, said: str, otherwise: str = "") -> Params:
    """frozen[name], a constant to differentiation.

    Args:
      frozen: the third argument of a loss function.
      name: "reference" or "teacher".
      said, otherwise: of the error, which algorithm asks for what, and what would do instead.

    Raises:
      ValueError: when it is not there.
    """
    if not (isinstance(frozen, dict) and name in frozen):
        raise ValueError(f"{said}frozen is a {type(frozen).__name__}; expected {{'{name}': params}}{otherwise}")
    return jax.lax.stop_gradient(frozen[name])
