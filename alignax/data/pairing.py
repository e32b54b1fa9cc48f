"""Which two of a prompt's samples to learn a preference from: `pairs(rewards [P, N], ...) -> Pairs`.

Runs on the host, in numpy. NaN is an answer that could not be scored, and is never chosen. A pair of equal rewards says
nothing, and is dropped; ties go to the lower index. What is random takes a generator, and repeats with its seed.
"""

from typing import NamedTuple

import numpy as np

from alignax.data.selection import Numbers, best_of_n


class Pairs(NamedTuple):
    """Which two samples of each prompt make a pair; -1 and -1 for prompts without one."""

    chosen: np.ndarray  # int [P]
    rejected: np.ndarray  # int [P]
    margin: np.ndarray  # float [P], r_chosen - r_rejected, 0 without a pair

    @property
    def kept(self) -> np.ndarray:
        """`[P]`, which prompts have a pair."""
        return self.chosen >= 0

    @property
    def dropped(self) -> int:
        """How many prompts have none."""
        return int((~self.kept).sum())


def max_min(rewards: Numbers) -> Pairs:
    """Max-min: best against worst, (argmax r, argmin r).

    See "RLHF Workflow: From Reward Modeling to Online RLHF", Dong et al. (https://arxiv.org/abs/2405.07863), section 3.

    Args:
      rewards: `[P, N]`.
    """
    rewards = _checked(rewards, "max_min")
    return _pairs(rewards, best_of_n(rewards), best_of_n(-rewards))


def max_max(rewards: Numbers) -> Pairs:
    """Max-max: best against second best, dropped where these are equal.

    See "RLHF Workflow: From Reward Modeling to Online RLHF", Dong et al. (https://arxiv.org/abs/2405.07863).

    Args:
      rewards: `[P, N]`.
    """
    rewards = _checked(rewards, "max_max")
    order = np.argsort(-rewards, axis=1, kind="stable")
    return _pairs(rewards, order[:, 0], order[:, 1])


def max_random(rewards: Numbers, rng: np.random.Generator | None = None) -> Pairs:
    """Max-random: best against any other, dropped where these are equal.

    See "RLHF Workflow: From Reward Modeling to Online RLHF", Dong et al. (https://arxiv.org/abs/2405.07863).

    Args:
      rewards: `[P, N]`.
      rng: draws the other. None: the first other one, which is as random when the samples come in no order.
    """
    rewards = _checked(rewards, "max_random")
    best = best_of_n(rewards)
    return _pairs(rewards, best, _ahead(rewards, rng, last=best)[:, 0])


def random_pair(rewards: Numbers, rng: np.random.Generator | None = None) -> Pairs:
    """Random pair: two different samples, the better one chosen, dropped where these are equal.

    See "RLHF Workflow: From Reward Modeling to Online RLHF", Dong et al. (https://arxiv.org/abs/2405.07863).

    Args:
      rewards: `[P, N]`.
      rng: draws the two. None: the first two, which are as random when the samples come in no order.
    """
    rewards = _checked(rewards, "random_pair")
    return _pairs(rewards, *_ahead(rewards, rng)[:, :2].T)


def max_min_penalised(rewards: Numbers, lengths: Numbers, *, length_penalty: float) -> Pairs:
    """Max-min by penalised rewards: best and worst of r - length_penalty * length; of these the better r is chosen.

    See "RLHF Workflow: From Reward Modeling to Online RLHF", Dong et al. (https://arxiv.org/abs/2405.07863), section 3.

    Args:
      rewards, lengths: `[P, N]`.
      length_penalty: what a token costs, in units of the rewards.

    Raises:
      ValueError: for lengths of another shape than the rewards.
    """
    rewards, lengths = _checked(rewards, "max_min_penalised"), np.asarray(lengths, np.float64)
    if lengths.shape != rewards.shape:
        raise ValueError(
            f"max_min_penalised: lengths {lengths.shape} beside rewards {rewards.shape}; expected one shape"
        )
    penalised = rewards - length_penalty * lengths
    return _pairs(rewards, best_of_n(penalised), best_of_n(-penalised))


def rs_dpo_pairs(
    rewards: Numbers, *, threshold: float, temperature: float = 1.0, most: int | None = None
) -> np.ndarray:
    """RS-DPO: every pair (j, l) with sigmoid((r_j - r_l) / temperature) > threshold, strictly.

    See "RS-DPO: A Hybrid Rejection Sampling and Direct Preference Optimization Method for Alignment of Large Language
    Models", Khaki et al. (https://arxiv.org/abs/2402.10038), algorithm 1.

    Args:
      rewards: `[N]`, of one prompt.
      threshold: in [0.5, 1): the higher, the fewer and the clearer (paper: eta).
      temperature: paper: tau.
      most: keep only so many, those of the widest gaps.

    Returns:
      int `[M, 2]`, chosen and rejected, in their order.

    Raises:
      ValueError: for a threshold outside [0.5, 1), a temperature of 0 or less, or rewards that are no list.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or not (0.5 <= threshold < 1 and temperature > 0):
        raise ValueError(
            f"rs_dpo_pairs: rewards {rewards.shape}, threshold={threshold}, temperature={temperature}; expected [N], "
            "0.5 <= threshold < 1 and a temperature above 0"
        )
    gap = rewards[:, None] - rewards[None, :]
    # sigmoid(x) > p where x > log(p / (1 - p)): a gap of 0 is never one
    pairs = np.argwhere(gap / temperature > np.log(threshold) - np.log1p(-threshold))
    if most is not None:
        widest = np.argsort(-gap[tuple(pairs.T)], kind="stable")[:most]
        pairs = pairs[np.sort(widest)]
    return pairs


def _checked(rewards: Numbers, name: str) -> np.ndarray:
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"{name}: rewards of shape {rewards.shape}; expected [P, N] with at least 2 samples (N)")
    return rewards


def _ahead(rewards: np.ndarray, rng: np.random.Generator | None, last: np.ndarray | None = None) -> np.ndarray:
    """Each prompt's samples in random order (as they come without a generator), those without a reward at the end."""
    rank = np.tile(np.arange(rewards.shape[1], dtype=float), (len(rewards), 1))
    rank = rank if rng is None else rng.random(rewards.shape)
    rank = np.where(np.isnan(rewards), np.inf, rank)
    if last is not None:
        rank[np.arange(len(rewards)), last] = np.inf
    return np.argsort(rank, axis=1, kind="stable")


def _pairs(rewards: np.ndarray, one: np.ndarray, other: np.ndarray) -> Pairs:
    """The better of two samples is chosen; no pair where they are equal, the same, or not scored."""
    rows = np.arange(len(rewards))
    gap = rewards[rows, one] - rewards[rows, other]
    keep = np.nan_to_num(gap) != 0
    chosen, rejected = np.where(gap > 0, one, other), np.where(gap > 0, other, one)
    return Pairs(np.where(keep, chosen, -1), np.where(keep, rejected, -1), np.where(keep, np.abs(gap), 0.0))
