"""That nothing is left out: every loss, advantage and correction is a row of `properties.Properties`, with all numbers.

The rows stand beside the tests of their family: `tests/losses`, `tests/advantages`, `tests/corrections_test.py`.
"""

import inspect

import objectives
import pytest

# what is no function of arrays to an array of rows, and has tests of its own
OTHERWISE = {
    *("losses.mixture",),  # makes a loss; losses.mpo is one
    *("losses.mismatched_kl", "losses.mean_reward", "losses.bco_delta"),  # statistics of a batch
    *("losses.load_balancing", "losses.mean_load", "losses.router_z"),  # means of sums that a router keeps
    *("corrections.mismatch_metrics", "corrections.ess"),  # metrics
    *("losses.beta_dpo_select", "advantages.gae", "advantages.informative_groups"),  # a draw, two results, a choice
}
STATIC = {"ddof", "clamp"}  # change the program, or make a loss


@pytest.fixture(scope="module")
def rows():
    return objectives.rows()


def test_every_function_has_its_row(rows):
    public = {
        path: function
        for functions in objectives.objectives().values()
        for path, function in functions.items()
        if path.split(".")[0] in ("losses", "advantages", "corrections")
    }
    assert OTHERWISE <= public.keys()
    missing = {path for path, function in public.items() if function not in rows} - OTHERWISE
    assert not missing


def test_every_hyperparameter_is_swept(rows):
    """Under one compilation, and against the loop: each is in the `hyper` of a row, or among its arrays."""
    left = {}
    for function, found in rows.items():
        keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
        numbers = {p.name for p in keywords if type(p.default) in (int, float)} - STATIC
        left[function.__name__] = numbers.difference(*(row.hyper | row.inputs for row in found))
    assert not {name: numbers for name, numbers in left.items() if numbers}
