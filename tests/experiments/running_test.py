"""What a run leaves in its folder, and how it goes on after it was killed."""

import copy
import dataclasses
import errno
import json
import os
import pathlib
import resource
import shutil
import signal

import common
import jax
import jax.numpy as jnp
import launch
import numpy as np
import optax
import pytest
import records
import running
import watch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from alignax import train
from alignax.data.batching import Position


@dataclasses.dataclass(frozen=True)
class Config(running.Options):
    output: pathlib.Path
    steps: int = 3
    rate: float = 0.1


DRAW = common.save_curves


@pytest.fixture(autouse=True, scope="module")
def _no_pictures():
    """What would be drawn is written instead: a picture costs more than a run of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "save_curves", lambda path, curves: path.write_text(json.dumps(curves)))
        yield


def test_run_writes_everything(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(common, "save_curves", DRAW)
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
        pytest.raises(watch.Stop, match=r"step 8: skipped/in_a_row is 10, the limit is 10.*The last: loss 2\."),
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


def test_a_run_that_is_called_finished_has_its_curves(tmp_path, monkeypatch):
    """A process that is killed between the two would never draw them: the next one finds nothing left to do."""
    written, write = [], records.write
    monkeypatch.setattr(common, "save_curves", lambda path, curves: written.append(path.name))
    monkeypatch.setattr(records, "write", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    with running.Run(Config(tmp_path / "out"), total=1) as run:
        run.log(1, {"a": 1.0})
        run.finish({"a": 1.0})
    assert written[-2:] == ["curves.png", "result.json"] and written.count("curves.png") == 1


def test_an_interrupted_run_keeps_its_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "save_curves", DRAW)
    with pytest.raises(KeyboardInterrupt), running.Run(Config(tmp_path / "out"), total=9, curves=("a",)) as run:
        run.log(0, {"a": 1.0, "b": 2.0})
        raise KeyboardInterrupt
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000


class Killed(Exception):
    """What stands for the end of a process in the middle of a step."""


def work(config, *, fail=0, at=None, data=(1, 2)):
    """A script in small: a random walk that each step depends on, logged and saved; `at` is called in a step."""
    run = running.Run(config, total=config.steps)
    if run.result is not None:
        return run.result
    with run:
        start = {"x": jnp.ones(3), "position": Position(), "key": jax.random.key(0)}
        saved = run.resume(start, unsaved={"data": np.array(data)})
        x, position, key = (saved[name] for name in start)
        if run.step == 0:
            run.log(0, {"held_out/loss": x.sum()})
        for step in range(run.step + 1, config.steps + 1):
            x = x * (1 + config.rate * jax.random.normal(jax.random.fold_in(key, step), (3,)))
            position = Position(position.epoch + (position.batch == 1), 1 - position.batch)
            if at is not None:
                at(step, run)
            run.log(step, {"loss": x.sum(), "epoch": position.epoch} | ({"bad": jnp.nan} if step == 2 else {}))
            if step == fail:
                raise Killed
            run.save(step, {"x": x, "position": position, "key": key})
        return run.finish({"loss": x.sum()})


def files(folder):
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "result.json", "curves.png")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing disturbed; it has no checkpoints."""
    config = Config(tmp_path_factory.mktemp("runs") / "whole", steps=6)
    with pytest.warns(RuntimeWarning, match="bad = nan"):
        result = work(config)
    assert not (config.output / "checkpoints").exists()
    return config, result


def again(whole, tmp_path, **options):
    """The same run in another folder, one that goes on."""
    return dataclasses.replace(whole[0], output=tmp_path / "run", resume="auto", **options)


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_a_run_goes_on_to_the_same_bytes(whole, tmp_path, capfd):
    config = again(whole, tmp_path, checkpoint_every=2)
    with pytest.raises(Killed):
        work(config, fail=5)
    with (config.output / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "lo')  # as a process that was killed may leave it
    seen = {}
    result = work(config, at=lambda step, run: seen.setdefault(step, copy.deepcopy(run.history)))
    assert list(seen) == [5, 6] and [step for step, _ in seen[5]["loss"]] == [1, 2, 3, 4]
    assert seen[5].keys() == {"loss", "epoch", "held_out/loss"}
    assert result == whole[1] and files(config.output) == files(whole[0].output)
    assert sorted(path.name for path in (config.output / "checkpoints").iterdir()) == ["4", "6"]
    (resumed,) = json.loads((config.output / "config.json").read_text())["resumed"]
    assert resumed["step"] == 4
    printed = capfd.readouterr()
    assert "goes on from step 4" in printed.out and "6/6" in printed.err
    before = files(config.output)
    assert work(config, at=lambda *_: pytest.fail("a step")) == result and files(config.output) == before
    assert "finished at step 6, nothing is left to do" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:step 2. not finite")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run(whole, tmp_path, number, capfd):
    config, before = again(whole, tmp_path), signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        work(config, at=lambda step, _: step == 3 and os.kill(os.getpid(), number))
    assert ended.value.code == running.PREEMPTED == 75 and signal.getsignal(number) is before
    assert f"{number.name}: saved at step 3" in capfd.readouterr().err
    assert work(config) == whole[1] and files(config.output) == files(whole[0].output)


def starts(folder):
    """From which steps on the newest TensorBoard file hides what those before it hold; see its records' format."""
    content = max(folder.glob("events.out.tfevents.*")).read_bytes()
    found = []
    while content:
        size = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + size])  # a checksum before and one after
        content = content[16 + size :]
        found += [event.step] if event.session_log.status == SessionLog.START else []
    return found


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_a_second_interrupt_ends_the_run_at_once(whole, tmp_path):
    def twice(step, _):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    config = again(whole, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        work(config, at=twice)
    assert not (config.output / "checkpoints").exists() and starts(config.output) == []
    said = r"run: NOTHING TO GO ON FROM: .* no checkpoint, metrics\.jsonl ends with step 0; begins at step 0 again"
    with pytest.warns(RuntimeWarning, match=said), pytest.raises(Killed):
        work(config, fail=1)
    assert starts(config.output) == [0]  # what the lives before logged is not drawn beside what this one does
    (config.output / "metrics.jsonl").write_text('null\n[]\n{"step": null}\n{"ste')
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl is empty; begins"), pytest.raises(Killed):
        work(config, fail=1)


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_a_run_that_is_to_stop_saves(whole, tmp_path):
    config = again(whole, tmp_path)
    with pytest.raises(SystemExit) as ended:
        work(config, at=lambda step, run: step == 4 and run.end(running.STOPPED, "enough"))
    assert ended.value.code == running.STOPPED == 77
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["4"]


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_changes_are_named(whole, tmp_path):
    config = again(whole, tmp_path, checkpoint_every=2)
    with pytest.raises(Killed):
        work(config, fail=3)
    other = dataclasses.replace(config, rate=0.5, steps=8)
    with pytest.raises(ValueError, match=r"rate was 0.1, is 0.5, steps was 6, is 8; .*--accept-changes"):
        work(other)
    with pytest.raises(ValueError, match=r"begun with other data; expected the same, or --accept-changes"):
        work(config, data=(1, 3))
    free = dataclasses.replace(config, output=config.output.rename(tmp_path / "moved"), keep=1, fsdp=2, watch_window=5)
    with pytest.raises(Killed):
        work(free, fail=4)
    work(dataclasses.replace(other, output=free.output, accept_changes=True), data=(1, 3))
    record = json.loads((free.output / "config.json").read_text())
    assert record["config"]["rate"] == 0.5 and [x["step"] for x in record["resumed"]] == [2, 2]
    assert record["resumed"][1]["changes"] == {"rate": [0.1, 0.5], "steps": [6, 8]}
    assert len((free.output / "metrics.jsonl").read_text().splitlines()) == 9
    (free.output / "result.json").unlink()
    work(dataclasses.replace(other, output=free.output, accept_changes=True, steps=7), data=(1, 3))
    assert json.loads((free.output / "result.json").read_text())["step"] == 8  # there is more than was asked for


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_what_no_run_goes_on_from(whole, tmp_path):
    longer = dataclasses.replace(whole[0], steps=9, resume="auto", accept_changes=True)
    before = files(whole[0].output)
    with pytest.raises(ValueError, match="finished at step 6, without checkpoints"):
        work(longer)
    assert files(whole[0].output) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"no output folder of a run, config\.json cannot be read"):
        work(Config(tmp_path, resume="auto"))
    with pytest.raises(ValueError, match=r"exists and is not empty.*go on from it with --resume auto"):
        work(whole[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"checkpoint_every": -1}, "checkpoint_every=-1; expected 0 or more"),
        ({"keep": 0}, "keep=0; expected 1 or more"),
        ({"watch_window": 0}, "watch_window=0; expected 1 or more"),
        ({"keep_best": "loss"}, "keep_best='loss' of a run that saves no checkpoints"),
    ],
)
def test_options_that_mean_nothing_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        running.Run(Config(tmp_path / "out", **options), total=1)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.json", "[]", "no output folder of a run, config.json cannot be read"),
        ("config.json", '{"config": {}, "script": "sft.py"}', r"begun by sft\.py, this is running_test\.py"),
        ("config.json", '{"config": 3}', "no output folder of a run, config.json cannot be read"),
        ("result.json", "", r"result\.json: is not JSON .*remove it"),
        ("result.json", "[]", r"result\.json: is \[\]; expected a step and a result by names; remove it"),
        ("result.json", '{"step": null, "result": {}}', r"result\.json: is .*None.*; expected a step"),
        ("result.json", '{"step": 6}', r"result\.json: is .*6.*; expected a step and a result"),
    ],
)
def test_damaged_records_are_named(whole, tmp_path, name, content, message):
    config = again(whole, tmp_path)
    shutil.copytree(whole[0].output, config.output)
    (config.output / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        running.Run(config, total=6)


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_lost_lines_are_told(whole, tmp_path):
    config = again(whole, tmp_path, checkpoint_every=2)
    with pytest.raises(Killed):
        work(config, fail=5)
    lines = (config.output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (config.output / "metrics.jsonl").write_text("".join(lines[:3]))
    with pytest.warns(RuntimeWarning, match="ends with step 2; expected all up to step 4"):
        assert work(config) == whole[1]


def test_a_folder_that_may_not_be_written_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is no folder that this process may write in"):
        running.Run(Config(tmp_path / "file" / "out"), total=1)
    monkeypatch.setattr(records.os, "access", lambda path, how: False)
    with pytest.raises(ValueError, match=rf"{tmp_path} is no folder that this process may write in"):
        running.Run(Config(tmp_path / "new" / "out"), total=1)


def test_a_file_system_without_locks_is_not_in_use(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(records.fcntl, "flock", flock)
    with pytest.raises(OSError, match="no locks available"):
        records.take(tmp_path)


@pytest.mark.parametrize("axes", [{"fsdp": 0}, {"fsdp": -1, "tensor": -1}])
def test_axes_below_one_are_refused(tmp_path, axes):
    with pytest.raises(ValueError, match=r"fsdp=.*; expected 1 or more"):
        launch.make_mesh(Config(tmp_path, **axes))


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_a_folder_has_one_run_at_a_time(whole, tmp_path):
    config = again(whole, tmp_path)

    def second(step, _):
        with pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} of "):
            work(config)

    assert work(config, at=second) == whole[1]
    assert work(config) == whole[1]  # nobody is in it now


@pytest.mark.filterwarnings("ignore:step 2. not finite")
def test_the_best_is_kept(whole, tmp_path):
    config = again(whole, tmp_path, checkpoint_every=1, keep=1, keep_best="loss")
    work(config)
    history = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()[1:]]
    best = min(history, key=lambda line: line["loss"])["step"]
    kept = sorted(path.name for path in (config.output / "checkpoints").iterdir())
    assert kept == sorted({str(best), "6"})
    with pytest.warns(RuntimeWarning, match="keep_best='nothing': not logged so far"):
        work(dataclasses.replace(config, output=tmp_path / "other", keep_best="nothing"))


@dataclasses.dataclass(frozen=True)
class Evaluated(Config):
    evaluate_every: int = 0


def test_the_best_evaluation_is_kept_though_no_checkpoint_is_due(tmp_path):
    def run(folder, losses, **options):
        saves = {"checkpoint_every": 3, "keep": 1, "keep_best": "held_out/loss"}
        config = Evaluated(tmp_path / folder, steps=11, resume="auto", **saves, **options)
        with running.Run(config, total=config.steps) as run:
            run.resume({"x": np.zeros(2)})
            for step in range(run.step, config.steps + 1):
                run.log(step, {"held_out/loss": losses[step]} if step in losses else {"loss": 0.0})
                if step:
                    run.save(step, {"x": np.full(2, step)})
        return sorted(path.name for path in (config.output / "checkpoints").iterdir())

    assert run("one", {0: 0.1, 4: 0.7, 8: 0.9}, evaluate_every=4) == ["11", "4"]  # worse than at the start
    assert run("two", {0: 0.9, 4: 0.7, 8: 0.5}, evaluate_every=4) == ["11", "8"]
    said = r"held_out/loss.*logged at the steps .*0, 4, 8.*, and a checkpoint every 3: there is none"
    with pytest.warns(RuntimeWarning, match=said):
        assert run("three", {0: 0.9, 4: 0.7, 8: 0.5}) == ["11"]


def test_one_process_says_that_there_is_no_best(tmp_path, monkeypatch):
    monkeypatch.setattr(running.checkpoint, "save", lambda *_, **__: None)
    monkeypatch.setattr(running.Run, "_checkpoints", lambda _: None)
    run = running.Run(Config(tmp_path / "run", checkpoint_every=1, keep_best="nothing"), total=1)
    run._writes = False  # as on the second process; a warning would be an error
    run.save(1, {})


def test_checkpoints_whose_metrics_are_lost_do_not_make_a_new_run(tmp_path):
    config = Config(tmp_path / "run", resume="auto", checkpoint_every=1, keep_best="loss")
    with running.Run(config, total=2) as run:
        run.resume({"x": np.zeros(2)})
        run.log(1, {"loss": 0.5})
        run.save(1, {"x": np.ones(2)})
    (config.output / "checkpoints" / "1" / "metrics" / "metrics").write_text("")
    before = (config.output / "metrics.jsonl").read_bytes()
    with pytest.raises(OSError, match="no checkpoint is whole"), running.Run(config, total=2) as run:
        run.resume({"x": np.zeros(2)})
    assert (config.output / "metrics.jsonl").read_bytes() == before != b""
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["1"]


def test_train_states_make_room_for_a_checkpoint(tmp_path):
    def everything(x):
        state = train.TrainState.create({"x": jnp.full(2, x)}, optax.identity())
        return {"states": {"policy": state}, "kept": {"x": jnp.full(2, x)}}

    config = Config(tmp_path / "run", resume="auto", checkpoint_every=1)
    given = everything(1.0), everything(2.0)
    with running.Run(config, total=1) as run:
        run.resume(given[0])
        run.log(1, {})
        run.save(1, given[0])
    with running.Run(config, total=2) as run:
        found = run.resume(given[1])
    assert found["states"]["policy"].params["x"].tolist() == found["kept"]["x"].tolist() == [1.0, 1.0]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given[1]["states"]))
    assert not given[1]["kept"]["x"].is_deleted()


@pytest.mark.parametrize("how", ["finish", "SIGTERM"])
def test_a_full_disk_at_the_end_is_told(tmp_path, how):
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000).astype(np.float32))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(
                OSError, match=r"step 1, or the one before, was not written; those before stay in .*run/check"
            ),
            running.Run(Config(tmp_path / "run", checkpoint_every=1), total=1) as run,
        ):
            run.resume(large)
            run.log(1, {})
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond fails, as on a full disk
            if how == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            run.save(1, large)
            run.finish({"a": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "result.json").exists()  # which would say that nothing is left to do
