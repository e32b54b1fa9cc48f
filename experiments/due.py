"""When a run saves a checkpoint: every so many steps, and when the metric it keeps the best of is better than ever."""

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from alignax.io import checkpoint

History = Mapping[str, Sequence[tuple[int, float]]]


class Due(NamedTuple):
    """every: steps between two checkpoints, 0 for none; evaluations: between two evaluations, 0 for none; best: the
    metric's name, or ""; total: the last step.
    """

    every: int
    evaluations: int
    best: str
    total: int

    def at(self, step: int, history: History) -> bool:
        """Whether a checkpoint of this step is due; the history is by metric, (step, value)."""
        return self.every > 0 and (step % self.every == 0 or step == self.total or self.is_best(step, history))

    def is_best(self, step: int, history: History) -> bool:
        """Whether `best` was evaluated at this step, and is better than ever since step 0, which saves nothing."""
        if not self.best or not self.evaluations or step % self.evaluations:
            return False
        # of those between, when it is logged at every step, none was saved
        known = {at: value for at, value in history.get(self.best, []) if at and self._may_be_kept(at)}
        if step not in known:
            return False
        better = operator.lt if checkpoint.less_is_better(self.best) else operator.gt
        return all(better(known[step], value) for at, value in known.items() if at != step)

    def _may_be_kept(self, step: int) -> bool:
        return any(step % every == 0 for every in (self.every, self.evaluations) if every)

    def unmeasured(self, step: int, history: History) -> str:
        """What is to be said when `best` keeps nothing, not logged at all or at no checkpoint's step; "" otherwise."""
        logged = sorted({number for number, _ in history.get(self.best, [])})
        if not self.best or step in logged:
            return ""
        if not logged:
            return f"keep_best={self.best!r}: not logged so far; expected one of {sorted(history)}"
        if step < self.total or any(at and self._may_be_kept(at) for at in logged):
            return ""
        steps = ", ".join(map(str, logged[:4])) + ", ..." * (len(logged) > 4)
        return (
            f"keep_best={self.best!r}: logged at the steps {steps}, and a checkpoint every {self.every}: there is none "
            "of them to keep"
        )
