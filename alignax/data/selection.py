"""Which of several samples of a prompt to learn from: best of n, filters, rejection sampling, pairs, tournaments.

Runs on the host, in numpy, and gives indices into the samples. `rewards [P, N]` are those of N samples of each of P
prompts; NaN is an answer that could not be scored, and is never chosen. Ties go to the lower index. What is random
takes the numbers it draws from the caller, and repeats with them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Numbers = Any  # what np.asarray takes: an array, nested lists, a number


def best_of_n(rewards: Numbers) -> np.ndarray:
    """Best of n: argmax_i r_i of each prompt.

    See "WebGPT: Browser-assisted question-answering with human feedback", Nakano et al.
    (https://arxiv.org/abs/2112.09332), section 3.2.

    Args:
      rewards: `[..., N]`.

    Returns:
      `[...]` indices, -1 where no answer was scored.
    """
    rewards = _floats(rewards)
    largest = np.max(np.where(np.isnan(rewards), -np.inf, rewards), axis=-1, keepdims=True)
    best = np.argmax(rewards == largest, axis=-1)  # NaN is not, even where all others are -inf
    return np.where(np.isnan(rewards).all(axis=-1), -1, best)


def best_of_n_kl(n: Numbers) -> np.ndarray:
    """KL of best of n from the policy it samples: log n - (n - 1) / n, in nats.

    Exact where no two answers have the same reward, an upper bound elsewhere. See "Theoretical guarantees on the
    best-of-n alignment policy", Beirami et al. (https://arxiv.org/abs/2401.01879).

    Raises:
      ValueError: for n below 1.
    """
    n = np.asarray(n, np.float64)
    if np.any(n < 1):
        raise ValueError(f"best_of_n_kl: n={n}; expected 1 or more")
    return np.asarray(np.log(n) - (n - 1) / n)


def best_of_n_expected(rewards: Numbers, n: int) -> np.ndarray:
    """Expected best of n, without bias from N >= n samples: sum_i C(i - 1, n - 1) / C(N, n) r_(i), r ascending.

    The mean over all choices of n among the N. See "WebGPT: Browser-assisted question-answering with human feedback",
    Nakano et al. (https://arxiv.org/abs/2112.09332), appendix I.

    Args:
      rewards: `[..., N]`, all scored.
      n: samples of which the best would be taken.

    Raises:
      ValueError: for n outside 1 to N, or a reward that is NaN.
    """
    rewards = np.sort(_floats(rewards), axis=-1)
    count = rewards.shape[-1]
    if not 1 <= n <= count:
        raise ValueError(f"best_of_n_expected: n={n} of {count} samples; expected 1 to {count}")
    if np.isnan(rewards).any():
        raise ValueError("best_of_n_expected: a reward is NaN; expected only answers that were scored")
    # C(i - 1, n - 1) / C(N, n) from the largest reward down: no factorial ever overflows
    weights = np.zeros(count)
    weights[-1] = n / count
    for i in range(count - 1, n - 1, -1):
        weights[i - 1] = weights[i] * (i + 1 - n) / i
    return np.asarray(rewards @ weights)


def top_k_over_n(rewards: Numbers, k: int) -> np.ndarray:
    """Top k over n: the k largest rewards of each prompt, best first.

    See "Statistical Rejection Sampling Improves Preference Optimization", Liu et al. (https://arxiv.org/abs/2309.06657),
    section 4.

    Args:
      rewards: `[..., N]`.
      k: how many to keep.

    Returns:
      `[..., k]` indices, -1 where fewer answers were scored.

    Raises:
      ValueError: for k outside 1 to N.
    """
    rewards = _floats(rewards)
    if not 1 <= k <= rewards.shape[-1]:
        raise ValueError(f"top_k_over_n: k={k} of {rewards.shape[-1]} samples; expected 1 to {rewards.shape[-1]}")
    order = np.argsort(-rewards, axis=-1, kind="stable")[..., :k]  # NaN comes last
    return np.where(np.isnan(np.take_along_axis(rewards, order, axis=-1)), -1, order)


def reward_weights(rewards: Numbers, *, beta: float) -> np.ndarray:
    """Reward-weighted regression: softmax(r / beta) over the samples of each prompt.

    See "Reinforcement Learning by Reward-weighted Regression for Operational Space Control", Peters and Schaal
    (https://doi.org/10.1145/1273496.1273590).

    Args:
      rewards: `[..., N]`; NaN weighs 0.
      beta: temperature: 0+ keeps the best only, large ones weigh all the same.

    Raises:
      ValueError: for a beta of 0 or less.
    """
    weights = _tilted(rewards, beta, "reward_weights")
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.finfo(float).tiny)


def rso_accept_probability(rewards: Numbers, *, beta: float = 0.5) -> np.ndarray:
    """RSO, acceptance: exp((r - max r) / beta), 1 for the best.

    See "Statistical Rejection Sampling Improves Preference Optimization", Liu et al. (https://arxiv.org/abs/2309.06657),
    section 3.2.

    Args:
      rewards: `[..., N]`; NaN is never accepted.
      beta: how strongly the sampling policy holds (paper: beta).

    Raises:
      ValueError: for a beta of 0 or less.
    """
    return _tilted(rewards, beta, "rso_accept_probability")


def rso_sample(rewards: Numbers, draw: Callable[[], float], *, count: int = 8, beta: float = 0.5) -> np.ndarray:
    """RSO, statistical rejection sampling: accept i when u < exp((r_i - max r) / beta), until `count` are accepted.

    Candidates of the sampling policy become samples of sampling policy x exp(r / beta). Every pass over what is left
    takes its own maximum, which is accepted, so that it ends. See "Statistical Rejection Sampling Improves Preference
    Optimization", Liu et al. (https://arxiv.org/abs/2309.06657), section 3.2 and algorithm 1.

    Args:
      rewards: `[N]`, of different candidates of one prompt (paper: 64).
      draw: gives the next number in [0, 1), as `np.random.default_rng(seed).random` does.
      count: how many to accept (paper: 8).
      beta: how strongly the sampling policy holds (paper: beta).

    Returns:
      indices in the order of acceptance, fewer than `count` where there are fewer candidates.

    Raises:
      ValueError: for a count below 1, a beta of 0 or less, or rewards that are no list.
    """
    rewards = _floats(rewards)
    if rewards.ndim != 1 or count < 1:
        raise ValueError(f"rso_sample: rewards of shape {rewards.shape}, count={count}; expected [N] and 1 or more")
    left, accepted = [int(i) for i in np.flatnonzero(~np.isnan(rewards))], []
    while left and len(accepted) < count:
        chances = rso_accept_probability(rewards[left], beta=beta)
        for i, chance in zip(list(left), chances, strict=True):
            if draw() < chance:
                accepted.append(i)
                left.remove(i)
            if len(accepted) == count:
                break
    return np.array(accepted, int)


def rest_filter(rewards: Numbers, threshold: float) -> np.ndarray:
    """ReST, filter of an improve step: r > threshold, strictly.

    See "Reinforced Self-Training (ReST) for Language Modeling", Gulcehre et al. (https://arxiv.org/abs/2308.08998),
    section 3. Thresholds rise from one improve step to the next; when nothing passes, the steps are over.

    Args:
      rewards: of any shape; NaN does not pass.
      threshold: paper: tau.

    Returns:
      booleans of the same shape.
    """
    return _floats(rewards) > threshold


class Tournament(NamedTuple):
    """The outcome of `tournament`. rounds: who met whom; pairs: `[M - 1, 2]`, each comparison's winner and loser."""

    winner: int
    pairs: np.ndarray
    rounds: list[list[tuple[int, int]]]


def tournament(
    prefer: Callable[[int, int], float], count: int, *, order: Sequence[int] | np.ndarray | None = None
) -> Tournament:
    """Tournament: neighbours meet, winners advance, the odd one out gets a bye; M - 1 comparisons rank M answers.

    See "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", Zhao et al. (https://arxiv.org/abs/2305.10425).

    Args:
      prefer: `(i, j)` -> probability that answer i is better than j; a judge that sees an order should be asked in both
        and averaged. Within 1e-6 of 1/2 the lower index wins.
      count: answers (M).
      order: in which they line up, a permutation of 0 to M - 1; shuffle it. As they come when None.

    Raises:
      ValueError: for a count below 1, an order that is no permutation, or a preference that is no probability.
    """
    standing = list(range(count)) if order is None else [int(i) for i in order]
    if count < 1 or sorted(standing) != list(range(count)):
        raise ValueError(f"tournament: count={count}, order={order}; expected at least one answer and a permutation")
    pairs, rounds = [], []
    while len(standing) > 1:
        met = list(zip(standing[::2], standing[1::2]))
        results = [_decided(prefer, i, j) for i, j in met]
        standing = [winner for winner, _ in results] + standing[2 * len(met) :]
        pairs, rounds = pairs + results, [*rounds, met]
    return Tournament(standing[0], np.array(pairs, int).reshape(-1, 2), rounds)


def hybrid_weights(online: Numbers, *, fraction: float) -> np.ndarray:
    """Hybrid batches: weights whose mean is fraction * mean(online rows) + (1 - fraction) * mean(offline rows).

    For a mean sum(w x) / sum(w); they add up to the number of rows. Where one side is empty the other counts whole. See
    "Iterative Preference Learning from Human Feedback: Bridging Theory and Practice for RLHF under KL-Constraint",
    Xiong et al. (https://arxiv.org/abs/2312.11456), for learning from both.

    Args:
      online: `[B]`, which rows were sampled from the current policy.
      fraction: weight of these, in [0, 1].

    Raises:
      ValueError: for a fraction outside [0, 1], or an online that is no list.
    """
    fresh = np.asarray(online) != 0
    if fresh.ndim != 1 or not 0 <= fraction <= 1:
        raise ValueError(f"hybrid_weights: online {fresh.shape}, fraction={fraction}; expected [B], 0 <= fraction <= 1")
    rows, count = len(fresh), int(fresh.sum())
    if count in (0, rows):
        return np.ones(rows, np.float32)
    return np.where(fresh, fraction * rows / count, (1 - fraction) * rows / (rows - count)).astype(np.float32)


def _decided(prefer: Callable[[int, int], float], i: int, j: int) -> tuple[int, int]:
    chance = prefer(i, j)
    if not 0 <= chance <= 1:  # NaN is not
        raise ValueError(f"tournament: prefer({i}, {j}) is {chance}; expected a probability")
    first = i < j if abs(chance - 0.5) < 1e-6 else chance > 0.5
    return (i, j) if first else (j, i)


def _tilted(rewards: Numbers, beta: float, name: str) -> np.ndarray:
    """exp((r - max r) / beta), 0 without a reward."""
    if not beta > 0:
        raise ValueError(f"{name}: beta={beta}; expected a number above 0")
    rewards = np.where(np.isnan(_floats(rewards)), -np.inf, _floats(rewards))
    largest = rewards.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.exp((rewards - np.where(largest == -np.inf, 0.0, largest)) / beta)


def _floats(x: Numbers) -> np.ndarray:
    return np.asarray(x, np.float64)
