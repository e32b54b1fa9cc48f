"""Rewards that a rule decides: makers of functions `reward(prompts, completions, **columns) -> list[float]`."""

import re
from collections.abc import Callable, Sequence


def distinct_words(words: Sequence[str], *, enough: int) -> Callable[..., list[float]]:
    """How many different ones of `words` a completion holds, as a fraction of `enough`, at most 1.

    Case does not matter and a word counts as a whole ("happy", not "unhappy"). Repeating one earns nothing, so that a
    policy cannot collect the reward with one word.

    Raises:
      ValueError: for no words, or an `enough` that they cannot reach.
    """
    if not 0 < enough <= len(set(words)):
        raise ValueError(f"distinct_words: enough={enough} of {len(set(words))} different words; expected 1 to as many")
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, words)) + r")\b", re.IGNORECASE)

    def reward(prompts: Sequence, completions: Sequence[str], **_) -> list[float]:
        found = [{word.lower() for word in pattern.findall(text)} for text in completions]
        return [min(len(words), enough) / enough for words in found]

    return reward


def finished(prompts: Sequence, completions: Sequence[str], *, truncated: Sequence[bool], **_) -> list[float]:
    """1 for a completion that ended by itself, 0 for one that was cut off at the longest allowed length."""
    return [float(not cut) for cut in truncated]


def weighted(*parts: tuple[float, Callable[..., Sequence[float]]]) -> Callable[..., list[float]]:
    """The sum of several rewards, each with its weight: `weighted((1.0, accuracy), (0.1, finished))`."""

    def reward(prompts: Sequence, completions: Sequence[str], **columns) -> list[float]:
        values = [function(prompts, completions, **columns) for _, function in parts]
        return [sum(weight * value for (weight, _), value in zip(parts, row)) for row in zip(*values, strict=True)]

    return reward


def last_number(prompts: Sequence, completions: Sequence[str], *, answer: Sequence[str], **_) -> list[float]:
    """1 where the last number of a completion is the last number of the column `answer` (GSM8K's `#### 42`), else 0.

    Thousands separators and a trailing ".0" do not matter.

    Raises:
      ValueError: for an answer without a number.
    """
    expected = [_last_number(text) for text in answer]
    if None in expected:
        raise ValueError(f"last_number: the answer {answer[expected.index(None)]!r} holds no number")
    return [float(_last_number(text) == value) for text, value in zip(completions, expected, strict=True)]


def _last_number(text: str) -> float | None:
    # a minus behind a digit is a difference ("3-4"), a comma groups thousands only by threes ("1,2,3" is a list)
    found = re.findall(r"(?<!\d)-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None
