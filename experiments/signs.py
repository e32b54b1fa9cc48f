"""The signs that a run goes wrong: which metric shows each, what it means, why it happens and what helps."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Points = Sequence[tuple[int, float]]  # (step, value), as they were logged
History = Mapping[str, Points]


class Sign(NamedTuple):
    """One sign. Its texts name `{name}` and `{value}`."""

    metrics: tuple[str, ...]  # names, alone or behind a prefix
    seen: str
    why: str  # and what to do
    about: tuple[str, bool]  # a number of `suspects.Rows`, and whether the largest stand out
    below: bool = False  # crossed from above
    # (history, name, window, since) -> points; None: as logged
    values: Callable[[History, str, int, float], Points] | None = None


def length_metrics(lengths: np.ndarray, rewards: np.ndarray, group: int = 1) -> dict[str, float]:
    """length/reward_slope and length/reward_correlation: what a longer completion gets, by least squares.

    Completions are compared with those of their own prompt, or without groups with all others, so that prompts that
    want more words for more reward do not count. 0 where lengths, or rewards, do not differ.

    Args:
      lengths, rewards: `[R]`, the rows of a group behind one another.
      group: how many they are.
    """
    x, y = (np.asarray(v, np.float64).reshape(-1, group if group > 1 else len(v)) for v in (lengths, rewards))
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (x, y))
    slope = np.sum(x * y) / max(np.sum(x * x), 1e-12)
    correlation = np.sum(x * y) / max(np.sqrt(np.sum(x * x) * np.sum(y * y)), 1e-12)
    return {"length/reward_slope": float(slope), "length/reward_correlation": float(correlation)}


def after(points: Points, since: float) -> Points:
    """Those of the points whose steps are later."""
    return points[bisect.bisect_right(points, since, key=lambda point: point[0]) :]


def since_start(history: History, name: str, window: int, since: float = -math.inf) -> Points:
    """A metric as a fraction of its mean over the first `window` points; of later points those after step `since`."""
    first = history[name][:window]
    start = float(np.mean([value for _, value in first])) if first else 0.0
    later = after(history[name], max(since, first[-1][0])) if start > 0 else []
    return [(step, value / start) for step, value in later]


def length_share(history: History, name: str, window: int, since: float = -math.inf) -> Points:
    """Which fraction of the gain in reward longer (or shorter) completions alone would have brought, at each step.

    share = slope (L - L_0) / (R - R_0)

    with reward R, length L and slope averaged over the last `window` steps, R_0 and L_0 over the first. The slope is
    what completions of one prompt get for a token more (`length_metrics`). 1 - share is the non-length reward
    gain of "A Long Way to Go: Investigating Length Correlations in RLHF", Singhal et al.
    (https://arxiv.org/abs/2310.03716), which takes it within bins of length instead. 0 where the reward has not risen
    by two standard errors, or the length has changed by less than a tenth. Steps up to `since` are left out.
    """
    columns = [history.get(key, ()) for key in ("reward", "length", name)]
    first = list(itertools.islice(_together(columns), window))
    rows, before = [], 0
    for row in _together(columns, backwards=True):
        before += row[0] <= since
        if row[0] <= first[-1][0] or before == window:  # no window of a later step reaches as far back
            break
        rows.append(row)
    if len(rows) < window:
        return []
    steps = [step for step, _ in reversed(rows)]
    start, series = (np.array([values for _, values in part]).T for part in (first, rows[::-1]))
    last = np.lib.stride_tricks.sliding_window_view(series, window, axis=1)
    gain, change = (last[i].mean(axis=1) - start[i].mean() for i in (0, 1))
    noise = np.sqrt((start[0].var() + last[0].var(axis=1)) / window)
    counts = (gain > 2 * noise) & (np.abs(change) > 0.1 * start[1].mean())
    share = np.where(counts, last[2].mean(axis=1) * change / np.where(counts, gain, 1.0), 0.0)
    return list(zip(steps[window - 1 :], share.tolist()))


def _together(columns: Sequence[Points], *, backwards: bool = False) -> Iterator[tuple[int, list[float]]]:
    """Step and values of the points that all columns have, from their starts or their ends; read as they are asked."""
    walks = [iter(reversed(column) if backwards else column) for column in columns]
    heads = [next(walk, None) for walk in walks]
    while all(heads):
        steps = [head[0] for head in heads if head]
        if min(steps) == max(steps):
            yield steps[0], [head[1] for head in heads if head]
            behind = range(len(walks))
        else:
            furthest = min(steps) if backwards else max(steps)
            behind = [i for i, step in enumerate(steps) if step != furthest]
        for i in behind:
            heads[i] = next(walks[i], None)


SIGNS: dict[str, Sign] = {
    "watch_kl": Sign(
        ("kl",),
        "{name} is {value} nats a completion: the policy has left the reference",
        "a learning rate too high, a KL weight too low, or a reward that pays for what no reader likes, which grows "
        'with this distance ("Scaling Laws for Reward Model Overoptimization", https://arxiv.org/abs/2210.10760). Read '
        "samples, raise the KL weight, lower the learning rate, or take the model of an earlier checkpoint",
        ("gap", True),
    ),
    "watch_step_kl": Sign(
        ("approx_kl",),
        "{name} is {value} nats a token: the updates of one rollout moved the policy far from what had sampled it",
        "a learning rate too high, or too many epochs and minibatches: PPO commonly ends a rollout's updates near "
        "0.02. Lower them, or clip more",
        ("gap", True),
    ),
    "watch_ratio": Sign(
        ("ratio/max",),
        "{name} is {value}: a token has become so many times as likely since it was sampled",
        "one token with a very small probability when it was sampled, or updates that are too large. Lower the "
        "learning rate or the number of updates of a rollout, or sample with --min-p",
        ("gap", True),
    ),
    "watch_entropy": Sign(
        ("entropy",),
        "{name} has fallen to {value} of what it was at the start: the policy says the same whatever it is asked",
        "rewards that one kind of answer gets; nothing is explored any more, and little more will be learned "
        '("The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", '
        "https://arxiv.org/abs/2505.22617). Raise the entropy weight, the KL weight or --clip-high, lower the learning "
        "rate, or end here if the reward is what it should be",
        ("logp", True),
        below=True,
        values=since_start,
    ),
    "watch_length": Sign(
        ("length/reward_slope",),
        "completions have changed in length, and that alone explains {value} of the gain in reward ({name})",
        'a reward that likes long answers, or short ones ("A Long Way to Go", https://arxiv.org/abs/2310.03716). Read '
        "samples, take the length out of the reward or penalise it, or use advantages and means that favour no length "
        "(--advantages group_centred --mean constant)",
        ("length", True),
        values=length_share,
    ),
    "watch_equal_groups": Sign(
        ("frac_reward_zero_std",),
        "{name} is {value}: so many groups have one reward for all their completions, and teach nothing",
        "prompts that are all too easy or too hard, a reward with few values, or a policy without entropy "
        '("DAPO", https://arxiv.org/abs/2503.14476, section 3.2). Choose other prompts, make groups larger or the '
        "reward finer, raise the temperature",
        ("spread", False),
    ),
    "watch_parity": Sign(
        ("parity/mean", "sampling/logp_diff_mean"),
        "{name} is {value} nats: sampler and trainer disagree about the tokens that were sampled",
        "a temperature that the trainer does not know, weights that are not the trainer's, or a sampler in low "
        "precision; runs with it may collapse late and suddenly (https://arxiv.org/abs/2605.14220). Sample without "
        "--rollout-bfloat16, or add a --correction",
        ("gap", True),
    ),
    "watch_truncated": Sign(
        ("truncated",),
        "{name} is {value}: so many completions end because they were cut off, not with an EOS",
        "a model that has not learned to end, the wrong EOS in generation_config.json, or --max-new-tokens too small; "
        "a reward then judges beginnings. Raise it, fine-tune on rows that end, or give --stop",
        ("length", True),
    ),
    "watch_short": Sign(
        ("length",),
        "{name} is {value} tokens: completions end at once",
        "a reward that is best for saying nothing, or a model whose template ends the turn itself. Read samples, and "
        "give empty completions the worst reward",
        ("length", False),
        below=True,
    ),
}
