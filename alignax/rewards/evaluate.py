"""Calling a reward function, with everything that can be wrong about what it returns checked once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np

_LARGEST = float(np.finfo(np.float32).max)
Reward = Callable[..., Sequence[float]]


def evaluate(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> np.ndarray:
    """`reward(prompts, completions, **columns)` as float32 `[B]`, checked.

    Args:
      reward: any function of the field's signature. It takes the columns it knows and `**_` for the others.
      prompts, completions: B of each.
      columns: name -> B values, such as the answer that belongs to a prompt.

    Raises:
      ValueError: for a column of another length, another number of rewards than completions, or a reward that is not
        a finite number; the error names the row and its prompt.
    """
    columns = dict(columns or {})
    if taken := {"prompts", "completions"} & set(columns):
        raise ValueError(f"evaluate: a column is named {taken.pop()!r}, which is an argument of every reward")
    for name, values in {"completions": completions, **columns}.items():
        if len(values) != len(prompts):
            raise ValueError(f"evaluate: {len(prompts)} prompts, but {len(values)} values of {name!r}")
    rewards = list(reward(prompts, completions, **columns))
    name = getattr(reward, "__name__", repr(reward))
    if len(rewards) != len(prompts):
        raise ValueError(f"reward {name} returned {len(rewards)} numbers for {len(prompts)} completions")
    for row, value in enumerate(rewards):
        if not (isinstance(value, SupportsFloat) and abs(float(value)) <= _LARGEST):  # NaN is not
            raise ValueError(
                f"reward {name} returned {value!r} for row {row}, prompt {prompts[row]!r}, completion "
                f"{completions[row]!r}; expected a finite number"
            )
    return np.array([float(value) for value in rewards], np.float32)
