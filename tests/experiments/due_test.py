"""When a checkpoint is due: by counting, and by the best of what is kept."""

import pytest
from due import Due


def history(values, name="reward"):
    return {name: list(enumerate(values))}


def kept(due, values, name="reward"):
    """The steps that are saved of a run with these values, one for each step from 0."""
    return [step for step in range(1, len(values)) if due.at(step, history(values[: step + 1], name))]


def test_every_so_often_and_at_the_end():
    assert kept(Due(3, 2, "", 7), [0.0] * 8) == [3, 6, 7]
    assert kept(Due(0, 2, "", 7), [0.0] * 8) == []


def test_an_evaluation_that_is_better_than_any_that_could_be_kept():
    """Step 5 is better than all, and no evaluation: it does not keep step 6 from being saved."""
    values = [0.95, 0.2, 0.5, 0.1, 0.4, 0.9, 0.8, 0.1, 0.7]
    assert kept(Due(11, 2, "reward", 20), values) == [2, 6]
    assert kept(Due(11, 2, "reward/loss", 20), values, "reward/loss") == [2, 4]


@pytest.mark.parametrize(
    "logged, step, expected",
    [
        ([], 4, "keep_best='reward': not logged so far; expected one of ['loss']"),
        ([1, 3, 5, 7, 9], 8, ""),  # before the end
        ([1, 5], 12, "logged at the steps 1, 5, and a checkpoint every 4: there is none of them to keep"),
        ([1, 3, 5, 7, 9], 12, "logged at the steps 1, 3, 5, 7, ..., and"),
        ([1, 8], 12, ""),
        ([1, 12], 12, ""),
    ],
)
def test_what_is_never_kept_is_told(logged, step, expected):
    points = {"loss": [(1, 0.0)]} | ({"reward": [(at, 0.5) for at in logged]} if logged else {})
    found = Due(4, 6, "reward", 12).unmeasured(step, points)
    assert expected in found and bool(expected) == bool(found)
