"""grpo.py with devices that sample: the run without them where they wait, and one that goes on where they do not."""

import json
import os
import pathlib
import subprocess
import sys
import types

import actors
import grpo
import jax
import pytest

from alignax import ahead

ROOT = pathlib.Path(__file__).parents[2]
OWN = {"staleness", "stale_dropped", "sent_bytes"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One process of four devices serves all tests of whole runs."""
    script = pathlib.Path(__file__).with_name("actors_script.py")
    folders = [ROOT / "tests", ROOT / "experiments", ROOT]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("actors"))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_actors_that_wait_change_nothing(report):
    """Every metric and every byte of the model is that of two devices that do both."""
    shared = [{name: x for name, x in line.items() if name not in OWN} for line in report["waiting"]]
    assert shared == report["in turn"] and report["same"]
    assert [line.get("staleness") for line in report["waiting"]] == [None, 0, 0]


def test_one_ahead_is_one_behind_and_says_so(report):
    _, first, second, third = report["ahead"]
    assert [line["staleness"] for line in (first, second, third)] == [0, 1, 1]
    assert abs(first["ratio/max"] - 1) < 1e-5 < 0.01 < second["ratio/max"] - 1  # to the weights that sampled
    assert third["stale_dropped"] == 0
    assert first["sent_bytes"] == 2 * 4 * report["numbers"]  # float32, the whole model to each of two actors


def test_a_run_that_goes_on_has_the_rollout_that_was_under_way(report):
    assert report["again"] == report["ahead"] and report["resumed"]


def config(**options):
    names = {"model": "", "data": "", "output": "", "reward": "last_number"}
    return grpo.Config(**{**names, "prompts": 4, "actors": 1, **options})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"actors": -1}, "actors=-1; expected 0 or more"),
        ({"staleness": -1}, "staleness=-1; expected 0 or more"),
        ({"actors": 0, "staleness": 2}, r"\['staleness'\] with actors=0, which samples by the newest weights"),
        ({"tensor": 2}, r"actors=1 with tensor \* expert = 2; expected a multiple"),
        ({"policy_loss": "reinforce"}, "reinforce with staleness=1: it knows no ratio"),
        ({"actors": 3}, "prompts=4 do not divide among 3 actors"),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, options, message):
    mesh = jax.sharding.AbstractMesh((options.get("actors", 1),), ("data",))
    monkeypatch.setattr(actors, "_mesh", lambda config: mesh)
    with pytest.raises(ValueError, match=message):
        actors.check(config(**options))


def test_losses_take_their_ratio_to_whoever_sampled():
    rows = types.SimpleNamespace(logp="sampler's")
    newest = lambda: "newest"  # noqa: E731
    assert actors.old_logp(config(), rows, newest) == "sampler's"
    assert actors.old_logp(config(correction="icepop"), rows, newest) == "newest"
    assert actors.old_logp(config(staleness=0), rows, newest) == "newest"
    assert actors.old_logp(config(actors=0), rows, None) is None  # the very weights that learn
    assert actors.old_logp(config(correction="icepop"), rows, None) is None


def test_what_is_under_way_is_packed_and_unpacked():
    """Two of three, whose prompts come from the stream again."""
    stage = actors.Stage(None, None, 0, "no rows")
    waiting = tuple(ahead.Stamped(version, (None, None, f"rows {version}")) for version in (1, 2))
    packed = actors.pack(stage, ahead.Queue(waiting, 7, 2), 3)
    assert packed["versions"].tolist() == [1, 2, -1] and packed["rows"] == ["rows 1", "rows 2", "no rows"]
    stream = iter([("first", 5), ("second", 6), "next"])
    queue = actors.unpack(packed, stream)
    expected = (ahead.Stamped(1, ("first", 5, "rows 1")), ahead.Stamped(2, ("second", 6, "rows 2")))
    assert queue == ahead.Queue(expected, 7, 2) and next(stream) == "next"
