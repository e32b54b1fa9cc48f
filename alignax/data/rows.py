"""Rows that remember where they came from, and the one place that decides what becomes of a bad one.

Every step over a data set (parsing, tokenising) is a function from one row to one row that raises `BadRow`. `collect`
maps it and either lets the error through or leaves the row out and counts why. Nothing is left out silently: the
counts come back with the rows, and `summary` prints them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One record of a source. `where` is `file:line` (or `file[index]`), for errors."""

    where: str
    fields: dict[str, Any]


class BadRow(ValueError):
    """A row that cannot be used; `reason` is the short form under which it is counted."""

    def __init__(self, where: str, reason: str, detail: str = ""):
        """An error reading `where: reason: detail`."""
        super().__init__(f"{where}: {reason}: {detail}" if detail else f"{where}: {reason}")
        self.reason = reason


class Dropped(BadRow):
    """A row that the caller asked to leave out (`truncation.drop`): counted, never raised by `collect`."""


def collect(
    function: Callable, rows: Iterable, *, drop: bool = False, note: Callable[[BadRow], None] | None = None
) -> tuple[list, Counter[str]]:
    """`[function(row) for row in rows]` and, by reason, the number of rows left out.

    Args:
      function: from one row to one row; raises `BadRow` where it cannot.
      rows: anything iterable.
      drop: False lets the first `BadRow` through; True leaves such rows out and counts them.
      note: is given the error of each row left out, which names the row.
    """
    kept, dropped = [], Counter()
    for row in rows:
        try:
            kept.append(function(row))
        except BadRow as error:
            if not (drop or isinstance(error, Dropped)):
                raise
            dropped[error.reason] += 1
            if note:
                note(error)
    return kept, dropped


def split(rows: Sequence, fraction: float, *, seed: int = 0) -> tuple[list, list]:
    """(rows to train on, rows held out): a random `fraction` is held out, decided by the seed and the number of rows.

    Both keep the order of `rows`. At least one row is held out when the fraction is above 0.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"the held-out fraction must be in [0, 1), got {fraction}")
    count = max(1, round(fraction * len(rows))) if fraction else 0
    if count and count >= len(rows):
        raise ValueError(f"cannot hold out {count} of {len(rows)} rows and train on the rest")
    held_out = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in held_out], [rows[i] for i in sorted(held_out)]


def summary(kept: Sequence, dropped: Counter[str]) -> str:
    """One printable line: rows read, kept and dropped by reason."""
    total = len(kept) + dropped.total()
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    return f"{total} rows read, {len(kept)} kept, {dropped.total()} dropped" + (f" ({reasons})" if reasons else "")
