"""What a run is watched for: bounds of its metrics, and what is said, or done, when one is crossed.

A bound is a number, a patience and a consequence, all of them flags: `--watch-kl.at 50 --watch-kl.patience 3
--watch-kl.then stop`. It looks at its metric (see signs.py) wherever that is logged, so that a script has the bounds
whose metrics it has. Warnings name what was seen, the bound, the usual reasons, what to do, and the rows that stand
out. A bound that stays crossed is told of again each time its count has doubled. What is counted can be counted again
from the history of the metrics: a resumed run goes on counting.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import suspects
from signs import SIGNS, History, Sign, after

from alignax import train

Counts = dict[tuple[str, str], tuple[float, int]]
"""By field and metric: up to which step it was counted, and how often in a row the bound was crossed then."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """When a metric is too far, and what then."""

    at: float | None
    """The number it may not reach; 0 or None: it is not watched."""
    patience: int = 1
    """How often in a row it must be seen there."""
    then: Literal["warn", "stop"] = "warn"
    """Say so, or save and end the run with exit code 77."""

    def __post_init__(self) -> None:
        """Refuses what would never be crossed, or always."""
        if self.at is not None and not self.at >= 0:
            raise ValueError(f"a bound at={self.at}; expected a number above 0, or 0 for none")
        if self.patience < 1:
            raise ValueError(f"a bound with patience={self.patience}; expected at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Bounds of a run's metrics: fields of a Config."""

    watch_skips: Bound = Bound(10, then="stop")
    """Updates in a row that were left out, since a loss or gradient was not finite."""
    watch_kl: Bound = Bound(100, 3)
    """Nats of a completion that policy and reference are apart."""
    watch_step_kl: Bound = Bound(0.1, 3)
    """Nats of a token that the updates of one rollout move the policy."""
    watch_ratio: Bound = Bound(100, 5)
    """Largest ratio of new and old probability of a token."""
    watch_entropy: Bound = Bound(0.1, 10)
    """Entropy of a token, as a fraction of what it was at the start."""
    watch_length: Bound = Bound(0.5, 10)
    """Fraction of the gain in reward that the change of length alone would have brought."""
    watch_equal_groups: Bound = Bound(0.9, 10)
    """Fraction of groups whose completions all have the same reward."""
    watch_parity: Bound = Bound(0.05)
    """Nats that sampler and trainer are apart about a sampled token, on average."""
    watch_truncated: Bound = Bound(0.9, 10)
    """Fraction of completions that were cut off before an EOS."""
    watch_short: Bound = Bound(1.5, 10)
    """Tokens of a completion, fewer of which are none."""
    watch_window: int = 20
    """Logged steps that make "the start", and that a change of length and reward is averaged over."""


_OFF: dict[str, Any] = dict.fromkeys(SIGNS, Bound(0))
_BARE = Options(**_OFF)


class Stop(Exception):
    """A bound that was to end the run has been crossed; the message says which and why."""


class Finding(NamedTuple):
    """A bound that is crossed. field: its name in `Options`; about: what its rows stand out by, see `signs.Sign`."""

    field: str
    text: str
    stop: bool
    about: tuple[str, bool]


def check(
    options: Options, history: History, step: int, values: Mapping[str, float], counts: Counts | None = None
) -> list[Finding]:
    """What there is to say of a step: bounds that have been crossed for their patience, and numbers that are none.

    Args:
      options: the bounds.
      history: by metric, all that was logged and finite, this step included.
      step: the one just logged.
      values: all that was logged at it.
      counts: what earlier calls counted, brought up to date, so that only what is new is read; without it, or for
        what it lacks, the history is counted from its start.
    """
    counts = {} if counts is None else counts
    found = [*_not_finite(step, values), *_skips(options.watch_skips, step, values)]
    for field, sign in SIGNS.items():
        bound = getattr(options, field)
        if bound.at:
            names = [name for name in values if name in history and _is(name, sign.metrics)]
            found += [x for name in names if (x := _crossed(field, sign, options, history, step, name, counts))]
    return found


def act(
    config: Any,
    history: History,
    step: int,
    values: Mapping[str, float],
    rows: Callable[[], suspects.Rows] | None = None,
    counts: Counts | None = None,
) -> None:
    """Warns of what `check` finds, and raises where a bound says stop. On several processes all call it, one speaks.

    Args:
      config: whose bounds count; where it has none, only updates that were left out and numbers that are none.
      history, step, values, counts: as in `check`.
      rows: gives the `suspects.Rows` of this step; called only when there is something to say of them.

    Warns:
      RuntimeWarning: for each finding, with the rows that stand out.

    Raises:
      Stop: with the texts of all findings that stop.
    """
    found = check(config if isinstance(config, Options) else _BARE, history, step, values, counts)
    if not found:
        return
    known = None if rows is None else rows()
    said = [x._replace(text=x.text + ("" if known is None else suspects.worst(known, *x.about))) for x in found]
    for finding in said:
        if jax.process_index() == 0 and not finding.stop:
            warnings.warn(finding.text, RuntimeWarning, stacklevel=3)
    if stops := [finding for finding in said if finding.stop]:
        advice = f"To go on all the same, change {' and '.join(finding.field for finding in stops)}."
        raise Stop("\n".join([*(finding.text for finding in stops), advice]))


def _not_finite(step: int, values: Mapping[str, float]) -> list[Finding]:
    bad = ", ".join(f"{name} = {value}" for name, value in values.items() if not math.isfinite(value))
    return [Finding("", f"step {step}: not finite: {bad}", False, ("logp", False))] if bad else []


def _skips(bound: Bound, step: int, values: Mapping[str, float]) -> list[Finding]:
    count = max((value for name, value in values.items() if _is(name, ("skipped/in_a_row",))), default=0.0)
    if not bound.at or not _due(bound, count / bound.at):
        return []
    try:
        train.stop_after_skips(step, values, limit=math.ceil(bound.at))
    except FloatingPointError as error:
        return [Finding("watch_skips", str(error), bound.then == "stop", ("logp", False))]
    return []


def _crossed(
    field: str, sign: Sign, options: Options, history: History, step: int, name: str, counts: Counts
) -> Finding | None:
    bound: Bound = getattr(options, field)
    since, count = counts.get((field, name), (-math.inf, 0))
    read = sign.values or (lambda history, name, window, since: after(history[name], since))
    points = read(history, name, options.watch_window, since)
    at = bound.at or 0.0
    for _, value in points:
        count = count + 1 if (value <= at if sign.below else value >= at) else 0
    if points:
        counts[field, name] = points[-1][0], count
    if not points or points[-1][0] != step or not _due(bound, count):
        return None
    seen = sign.seen.format(name=name, value=f"{points[-1][1]:.4g}")
    often = f", and the last {count} times it was logged" if count > 1 else ""
    text = f"step {step}: {seen}. The bound, {field}.at, is {at:g}: crossed now{often}. Usual reasons: {sign.why}."
    return Finding(field, text, bound.then == "stop", sign.about)


def _due(bound: Bound, count: float) -> bool:
    """Whether to speak: a stop once the patience is over, a warning after one, two, four ... patiences."""
    times = count / bound.patience
    return times >= 1 and (bound.then == "stop" or math.log2(times).is_integer())


def _is(name: str, metrics: Sequence[str]) -> bool:
    """Whether a logged name is one of the metrics, alone or behind a prefix; terms of a loss are none."""
    return not name.startswith("loss/") and any(name == m or name.endswith(f"/{m}") for m in metrics)
