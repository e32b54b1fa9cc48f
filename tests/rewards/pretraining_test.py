"""Public data as preferences."""

from alignax import rewards


def test_answers_are_scored_by_their_votes():
    votes = {0: 0, 1: 1, 2: 2, 3: 2, 10: 3, 1023: 10, -1: -1, -50: -1}
    assert {n: rewards.stack_exchange_score(n) for n in votes} == votes
    assert rewards.stack_exchange_score(3, accepted=True) == 3
    assert rewards.stack_exchange_score(-2, accepted=True) == -1


def test_a_ranked_pair_is_two_binary_ones():
    assert rewards.binarised("yes", "no", good="+", bad="-") == [("+yes", "-yes"), ("-no", "+no")]
