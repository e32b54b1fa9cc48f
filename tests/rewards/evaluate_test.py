import numpy as np
import pytest

from alignax import rewards


def length(prompts, completions, **_):
    return [len(text) for text in completions]


def test_columns_reach_the_reward():
    def reward(prompts, completions, *, answer, **_):
        return [float(a == c) for a, c in zip(answer, completions)]

    result = rewards.evaluate(reward, ["p", "q"], ["x", "y"], {"answer": ["x", "z"], "other": [0, 0]})
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, [1, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1", 1e300])
def test_a_reward_that_is_no_number_names_its_prompt(bad):
    with pytest.raises(ValueError, match=r"returned (nan|inf|None|'1'|1e\+300) for row 1, prompt 'q', completion 'y'"):
        rewards.evaluate(lambda p, c: [1.0, bad], ["p", "q"], ["x", "y"])


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="returned 1 numbers for 2 completions"):
        rewards.evaluate(lambda p, c: [1.0], ["p", "q"], ["x", "y"])
    with pytest.raises(ValueError, match="2 prompts, but 1 values of 'completions'"):
        rewards.evaluate(length, ["p", "q"], ["x"])
    with pytest.raises(ValueError, match="a column is named 'prompts'"):
        rewards.evaluate(length, ["p", "q"], ["x", "y"], {"prompts": [1, 2]})
    with pytest.raises(ValueError, match="2 prompts, but 3 values of 'answer'"):
        rewards.evaluate(length, ["p", "q"], ["x", "y"], {"answer": [1, 2, 3]})
