"""Public data as preferences, for preference-model pre-training (`alignax.losses.pmp`). On the host.

See "A General Language Assistant as a Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861),
section 4.
"""

import math


def stack_exchange_score(upvotes: int, accepted: bool = False) -> int:
    """Stack Exchange score: round(log2(1 + upvotes)), + 1 if accepted; -1 if upvotes < 0.

    Two answers of one question with equal scores are no pair.
    """
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + bool(accepted)


def binarised(better: str, worse: str, *, good: str = "GOOD: ", bad: str = "BAD: ") -> list[tuple[str, str]]:
    """Binarised pair: (better, worse) -> (good better, bad better), (bad worse, good worse); the preferred one first.

    A control word before an answer says what it is; that it is the right word is what the model learns.
    """
    return [(good + better, bad + better), (bad + worse, good + worse)]
