"""The benchmark of actors beside learners: what it says of given readings, and the batch that it makes."""

import argparse
import importlib
import pathlib

import numpy as np
import pytest

from alignax import sampling

BENCHMARKS = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("asynchronous")


def test_the_table_of_given_readings(script):
    found = {"seconds": 1.25, "waits": 2, "both": [3, 4]}
    arguments = {"actors": 2}
    sizes = {"of weights": 2**20, "sent": 3 * 2**20, "to a device": 2**19}
    report = {"device": "4 x cpu", "jax": "0", "arguments": arguments, "bytes": sizes, "ways": {"one ahead": found}}
    first, second, _, last = script.table(report).splitlines()
    assert first == "4 x cpu, 2 of them actors, jax 0"
    assert second == "1.0 MiB of weights, 3.0 MiB sent, 0.5 MiB to a device"
    assert last.split() == ["one", "ahead", "1.250", "2", "3", "of", "4"]


def test_a_rollout_is_judged_by_its_odd_tokens(script):
    """Two prompts, two completions of two tokens each, of which 2, 1, 0 and 0 are odd, in rows of three."""
    tokens, mask = np.array([[7, 1, 3], [7, 2, 5], [7, 2, 2], [7, 4, 6]]), np.array([[0, 1, 1]] * 4)
    rows = sampling.Samples(tokens, mask, mask, mask * 0.5, mask.sum(1), mask.sum(1), None)
    batch = script.judged(argparse.Namespace(judge_seconds=0, group=2), rows)
    np.testing.assert_allclose(batch.advantages, np.float32([1, -1, 0, 0]) / 6, rtol=1e-6)
    assert batch.old_logp is rows.logp
