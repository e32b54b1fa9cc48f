import pytest

from alignax import rewards


def test_distinct_words():
    reward = rewards.distinct_words(["happy", "smile", "fun"], enough=2)
    texts = ["Happy and happy, HAPPY!", "unhappy funny smiles", "fun. A smile; happy", "a smile", ""]
    assert reward([""] * 5, texts, other=[0] * 5) == [0.5, 0.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("enough", [0, 3])
def test_distinct_words_that_cannot_be_reached(enough):
    with pytest.raises(ValueError, match=f"enough={enough} of 2 different words"):
        rewards.distinct_words(["a", "b", "a"], enough=enough)


def test_finished_and_weighted():
    reward = rewards.weighted((1.0, rewards.distinct_words(["a"], enough=1)), (0.5, rewards.finished))
    assert reward(["", ""], ["a", "b"], truncated=[True, False]) == [1.0, 0.5]


def test_last_number():
    answers = ["so 3 * 4 = 12\n#### 1,234", "#### -7", "#### 2.50"]
    assert rewards.last_number([""] * 3, ["It is 1234.0", "7", "costs $2.5."], answer=answers) == [1.0, 0.0, 1.0]
    odd = ["from 3-4", "one of 1,2,3", "1e5", "x = -2"]
    assert rewards.last_number([""] * 4, odd, answer=["4", "3", "100000", "-2"]) == [1.0] * 4
    assert rewards.last_number([""], ["no idea"], answer=["#### 3"]) == [0.0]
    with pytest.raises(ValueError, match="'none' holds no number"):
        rewards.last_number([""], ["3"], answer=["none"])
