"""Public data as preferences, for preference-model pre-training (`alignax.losses.pmp`). On the host.

See "A General Language Assistant as a Laboratory for Alignment", Askell et al. (https://arxiv.org/abs/2112.00861),
section 4.
"""

import math


def stack_exchange_score(upvotes: int, accepted: bool = False) -> int:
    """round(log2(1 + upvotes)), one more for the accepted answer; -1 for answers that were voted down.

    Two answers with equal scores are no pair.
    """
    return -1 if upvotes < 0 else round(math.log2(1 + upvotes)) + bool(accepted)


def binarised(better: str, worse: str, *, good: str = "GOOD: ", bad: str = "BAD: ") -> list[tuple[str, str]]:
    """A ranked pair as two pairs (preferred, other) that say good or bad of one answer each.

    A control word stands before the answer: the better one is rather good than bad, the worse one rather bad than good.
    """
    return [(good + better, bad + better), (bad + worse, good + worse)]
