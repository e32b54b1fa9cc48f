"""What a run leaves in its folder, and how it goes on after it was killed."""

import dataclasses
import json
import pathlib

import common
import jax
import jax.numpy as jnp
import pytest
import running


@dataclasses.dataclass(frozen=True)
class Config(running.Options):
    output: pathlib.Path
    steps: int = 3
    rate: float = 0.1


def test_run_writes_everything(tmp_path, capfd):
    folder = tmp_path / "runs" / "one"
    with running.Run(Config(folder), total=3, show=("loss",)) as run:
        for step in range(1, 4):
            returned = run.log(step, {"loss": jnp.float32(1.0 / step), "reward/mean": 2 * step})
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            assert len(lines) == step  # already on disk
    assert returned == {"loss": pytest.approx(1 / 3), "reward/mean": 6.0}
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0, "reward/mean": 2.0},
        {"step": 2, "loss": 0.5, "reward/mean": 4.0},
        {"step": 3, "loss": pytest.approx(1 / 3), "reward/mean": 6.0},
    ]
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 3
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = folder.glob("events.out.tfevents.*")
    assert b"reward/mean" in events.read_bytes()
    assert "3/3" in capfd.readouterr().err
    assert run.history["reward/mean"] == [(1, 2.0), (2, 4.0), (3, 6.0)]


def test_run_ends_after_steps_left_out_in_a_row(tmp_path):
    with (
        pytest.raises(FloatingPointError, match=r"step 8: skipped/in_a_row is 10, the limit is 10.*The last: loss 2\."),
        running.Run(Config(tmp_path / "out"), total=10) as run,
    ):
        run.log(7, {"loss": 2.0, "skipped/in_a_row": jnp.float32(9)})
        run.log(8, {"loss": 2.0, "skipped/in_a_row": jnp.float32(10)})
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2  # the last is on disk too


def test_run_reports_non_finite_metrics(tmp_path):
    with (
        running.Run(Config(tmp_path / "out"), total=1) as run,
        pytest.warns(RuntimeWarning, match="step 7: .*kl = nan"),
    ):
        run.log(7, {"kl": jnp.nan, "ratio": jnp.inf, "loss": 1.0})
    (line,) = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line and "Infinity" not in line
    assert json.loads(line) == {"step": 7, "kl": None, "ratio": None, "loss": 1.0}


def test_run_transfers_once_per_step(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "to_host", lambda tree: calls.append(tree) or jax.device_get(tree))
    with running.Run(Config(tmp_path / "out"), total=2) as run:
        for step in range(2):
            run.log(step, {name: jnp.float32(step) for name in "abcdef"})
    assert len(calls) == 2


def test_run_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists and is not empty"):
        running.Run(Config(tmp_path), total=1)
    with pytest.raises(ValueError, match=r"notes\.txt exists"):
        running.Run(Config(tmp_path / "notes.txt"), total=1)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_run_touches_nothing_before_it_is_entered(tmp_path):
    running.Run(Config(tmp_path / "out"), total=1)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    running.Run(Config(tmp_path / "out"), total=1)  # an empty folder will do
    assert not any((tmp_path / "out").iterdir())


def test_an_interrupted_run_keeps_its_curves(tmp_path):
    with pytest.raises(KeyboardInterrupt), running.Run(Config(tmp_path / "out"), total=9, curves=("a",)) as run:
        run.log(0, {"a": 1.0, "b": 2.0})
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
