"""What `--share-prompts` of preference.py does: the beginning that both sides of a pair share runs once."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from alignax import layouts
from alignax.types import Model

Batch = Mapping[str, Any]
_FINENESS = 16  # candidates for the columns of a prompt


class Shape(NamedTuple):
    """Columns of a pair's common beginning, and of each side behind it."""

    prompt: int
    completion: int


class Sharing(NamedTuple):
    """How pairs enter the network, by the width of their batch; as they are where no shape is given."""

    shapes: Mapping[int, Shape] = {}

    def arrange(self, batch: Batch) -> tuple[Batch, int]:
        """A batch of pairs in the shape of its width, and the columns of its completions, 0 where it does not fit."""
        width = batch["tokens"].shape[2]
        if width not in self.shapes:
            return batch, 0
        prompt, completion = self.shapes[width]
        if columns_behind(batch, np.array([prompt]))[0] > completion:
            return batch, 0
        arrays = ("tokens", "segments", "mask")
        return {**batch, **{name: _widened(batch[name], prompt + completion) for name in arrays}}, completion


def network(model: Model, completion: int) -> Model:
    """The model for what `Sharing.arrange` gave."""
    return layouts.shared_prompt(model, members=2, completion=completion) if completion else model


def arrange(config: Any, pairs: Sequence, batches: partial) -> Sharing:
    """Chooses shapes on the first epoch's batches, at most one for each width; prints what they save, if a tenth.

    Rows that are packed have no common prompt, nor have the pairs' companions, degraded rows.
    """
    if not config.share_prompts or config.pack:
        return Sharing()
    found: dict[int, list[np.ndarray]] = {}
    for batch, _ in itertools.islice(batches(pairs, seed=config.seed, epochs=1), config.steps):
        if "degraded" in batch:
            return Sharing()
        width = batch["tokens"].shape[2]
        found.setdefault(width, []).append(columns_behind(batch, candidates(width)))
    plans = {width: choose(width, np.array(behind)) for width, behind in found.items()}
    before = sum(2 * width * len(behind) for width, behind in found.items())
    after = sum(tokens for _, tokens in plans.values())
    if before < 1.1 * after:
        return Sharing()
    print(f"in updates a prompt runs once for both sides of its pair: {before / after:.1f} times fewer tokens")
    return Sharing({width: shape for width, (shape, _) in plans.items() if shape is not None})


def candidates(width: int) -> np.ndarray:
    """The numbers of columns that a prompt in rows of this width may be given."""
    step = max(1, width // _FINENESS)
    return np.arange(step, width, step)


def columns_behind(batch: Batch, prompts: np.ndarray) -> np.ndarray:
    """The columns that all sides fit into behind their common beginning, for each number of columns that this has."""
    tokens, real = batch["tokens"], batch["segments"] != 0
    same = (tokens[:, 0] == tokens[:, 1]) & real.all(axis=1)
    common = np.cumprod(same, axis=1).sum(axis=1)
    longest = real.sum(axis=2).max(axis=1)
    return (longest[:, None] - np.minimum(common[:, None], prompts)).max(axis=0)


def choose(width: int, behind: np.ndarray) -> tuple[Shape | None, int]:
    """The shape with which batches of this width have the fewest tokens, counting one pair of each, and how many.

    Batches that do not fit stay as they are. behind [batches, candidates]: what `columns_behind` found. The shape is
    None where none saves a tenth.
    """
    best, plain = (None, 2 * width * len(behind)), 2 * width * len(behind)
    for prompt, needed in zip(candidates(width).tolist(), behind.T):
        for completion in sorted({_rounded(n, width) for n in needed.tolist()}):
            fits = int(np.count_nonzero(needed <= completion))
            tokens = fits * (prompt + 2 * completion) + (len(needed) - fits) * 2 * width
            if tokens < best[1] and plain >= 1.1 * tokens:
                best = Shape(prompt, completion), tokens
    return best


def _rounded(columns: int, width: int) -> int:
    step = max(1, width // _FINENESS)
    return max(step, -(-columns // step) * step)


def _widened(array: np.ndarray, width: int) -> np.ndarray:
    """[B, 2, T] with columns of padding added or taken away."""
    more = max(0, width - array.shape[2])
    return np.pad(array, ((0, 0), (0, 0), (0, more)))[:, :, :width]
