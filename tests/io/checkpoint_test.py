"""Checkpoints: what comes back, what is kept, and what becomes of damage of every kind."""

import os
import pathlib
import resource
import shutil
import subprocess
import sys
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignax import train
from alignax.io import checkpoint


class Position(NamedTuple):
    epoch: int
    row: np.ndarray


@pytest.fixture
def manager(tmp_path):
    with_best = checkpoint.open_manager(tmp_path / "checkpoints", keep=2, best="accuracy")
    yield with_best
    with_best.close()


def save(manager, step, tree, **options):
    checkpoint.save(manager, step, tree, **options)
    manager.wait_until_finished()


def test_everything_comes_back(manager):
    params = {"kernel": jnp.linspace(0, 1, 12).reshape(3, 4), "half": jnp.ones(3, jnp.bfloat16)}
    tree = {
        "state": train.TrainState.create(params, optax.adamw(1e-3), jax.random.key(5)),
        "position": Position(3, np.array([1, 2], np.int64)),
        "numbers": {"large": 2**50, "third": 1 / 3, "yes": True, "name": "a", "none": None, "nan": float("nan")},
        "numpy": np.float64(1 / 3),
        "weak": jnp.asarray(0.5),
        "empty": jnp.zeros((0, 2)),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 2),
        "a/b": [jnp.int32(1), {"c.d": jnp.int8(-1)}],
    }
    save(manager, 4, tree, about={"history": [1.5]})
    found = checkpoint.restore(manager, tree)
    assert found.step == 4 and found.about == {"history": [1.5]} and found.versions["jax"] == jax.__version__
    assert jax.tree.structure(found.trees) == jax.tree.structure(tree)
    for got, want in zip(jax.tree.leaves(found.trees), jax.tree.leaves(tree), strict=True):
        assert type(got) is type(want)
        if hasattr(want, "dtype"):
            assert got.dtype == want.dtype and getattr(got, "weak_type", 0) == getattr(want, "weak_type", 0)
        if isinstance(want, jax.Array) and jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


def test_what_is_kept(manager):
    tree = {"x": jnp.zeros(2)}
    for step, accuracy in enumerate([None, 0.5, 0.9, 0.7, None, 0.8]):
        checkpoint.save(manager, step, tree, metrics=None if accuracy is None else {"accuracy": accuracy})
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 4, 5]


def test_a_manager_for_losses(tmp_path):
    losses = checkpoint.open_manager(tmp_path, keep=1, best="held_out/loss")
    for step, loss in enumerate([0.5, 0.2, 0.3]):
        checkpoint.save(losses, step, {"x": jnp.zeros(2)}, metrics={"held_out/loss": loss})
    losses.close()
    assert sorted(losses.all_steps()) == [1, 2]
    with pytest.raises(ValueError, match="keep=0; expected at least 1"):
        checkpoint.open_manager(tmp_path, keep=0)


RANDOM = {"x": jnp.asarray(np.random.default_rng(0).normal(size=3000).astype(np.float32)), "n": 7}
RANDOM |= {"empty": jnp.zeros((0, 2))}  # one array to read: of several that fail, Orbax forgets all but the first


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of the checkpoints 1 and 2, each with its number."""
    folder = tmp_path_factory.mktemp("two")
    both = checkpoint.open_manager(folder, best="accuracy")
    for step in (1, 2):
        save(both, step, RANDOM | {"step": step}, metrics={"accuracy": 0.1})
    both.close()
    return folder


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "a bit of an array": (lambda folder: flip(largest(folder)), "other bits than were written, in x"),
    "half of an array": (lambda folder: truncate(largest(folder)), "ValueError"),
    "no array": (lambda folder: largest(folder).unlink(), "ValueError"),
    "half of the description": (lambda folder: truncate(folder / "content" / "metadata"), "JSONDecodeError"),
    "another number": (
        lambda folder: (folder / "content" / "metadata").write_text(
            (folder / "content" / "metadata").read_text().replace('"value": 7', '"value": 8')
        ),
        "other contents than were written",
    ),
    "unreadable metrics": (lambda folder: truncate(folder / "metrics" / "metrics"), "its metrics"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(two, tmp_path, kind):
    damage, said = DAMAGE[kind]
    folder = shutil.copytree(two, tmp_path / "two")
    damage(folder / "2")
    example = RANDOM | {"step": 0, "x": jnp.zeros(3000), "empty": jnp.zeros((0, 2))}
    with pytest.warns(RuntimeWarning, match=rf"(?s)CHECKPOINT DAMAGED, moved to .*/damaged: .*/2: .*{said}"):
        manager = checkpoint.open_manager(folder, best="accuracy")
        found = checkpoint.restore(manager, example, donate=[example["x"], example["empty"]])
    assert found.step == found.trees["step"] == 1 and example["x"].is_deleted()
    assert not found.trees["empty"].is_deleted()  # of which Orbax writes nothing
    np.testing.assert_array_equal(found.trees["x"], RANDOM["x"])
    save(manager, 2, RANDOM | {"step": 22})  # its place is free again
    assert checkpoint.restore(manager, RANDOM | {"step": 0}).trees["step"] == 22
    assert len(list((folder / "damaged").glob("2-*"))) == 1
    manager.close()


def test_whatever_file_is_damaged_what_comes_back_was_saved(two, tmp_path):
    names = [path.relative_to(two) for path in (two / "2").rglob("*") if path.is_file() and path.stat().st_size]
    stepped = []
    for number, (name, damage) in enumerate((name, how) for name in names for how in (truncate, os.remove)):
        folder = shutil.copytree(two, tmp_path / str(number))
        damage(folder / name)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            manager = checkpoint.open_manager(folder, best="accuracy")
            found = checkpoint.restore(manager, RANDOM | {"step": 0})
            manager.close()
        assert found.trees["step"] == found.step and found.trees["n"] == 7, name
        np.testing.assert_array_equal(found.trees["x"], RANDOM["x"])
        assert (found.step == 1) == any("CHECKPOINT DAMAGED" in str(warning.message) for warning in said), name
        stepped.append(found.step)
    assert {1, 2} == set(stepped)  # Orbax writes files that nobody needs


def test_none_is_whole(manager):
    assert checkpoint.restore(manager, RANDOM) is None
    for step in (1, 2):
        save(manager, step, RANDOM)
        flip(largest(pathlib.Path(manager.directory) / str(step)))
    with pytest.raises(OSError, match=r"(?s)checkpoints: no checkpoint is whole:.*2: .*other bits.*1: .*other bits"):
        checkpoint.restore(manager, RANDOM)
    assert sorted(manager.all_steps()) == [1, 2]  # nothing is moved, there may be help


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b"")])
def test_no_metrics_can_be_read(two, tmp_path, damage):
    """Nothing is moved: without a step it would look as if nothing had ever been saved."""
    folder = shutil.copytree(two, tmp_path / "two")
    for step in ("1", "2"):
        damage(folder / step / "metrics" / "metrics")
    with pytest.raises(OSError, match=r"(?s)two: no checkpoint is whole:.*2: its metrics: .*1: its metrics: "):
        checkpoint.open_manager(folder, best="accuracy")
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_what_was_never_written_in_full_is_no_damage(two, tmp_path):
    folder = shutil.copytree(two, tmp_path / "two")
    shutil.rmtree(folder / "1")
    truncate(folder / "2" / "metrics" / "metrics")
    (folder / "2").rename(folder / "2.orbax-checkpoint-tmp")  # as a process that was killed may leave it
    manager = checkpoint.open_manager(folder, best="accuracy")
    assert checkpoint.restore(manager, RANDOM) is None
    manager.close()
    assert not (folder / "damaged").exists()


def test_another_structure_is_no_damage(manager):
    save(manager, 1, {"x": jnp.zeros(2), "old": 1, "number": 2.0})
    expected = (
        r"1: other contents than expected: new is not in it; number is a number, expected .*; old is not expected"
    )
    with pytest.raises(ValueError, match=expected + r"; x is .*\[2\].*float32.*, expected .*\[3\]"):
        checkpoint.restore(manager, {"x": jnp.zeros(3), "new": 1, "number": jnp.zeros(())})
    with pytest.raises(TypeError, match="made/of: object; expected an array, a number or a text"):
        checkpoint.save(manager, 2, {"made": {"of": object()}})
    with pytest.raises(TypeError, match="numpy array of dtype object"):
        checkpoint.save(manager, 2, {"x": np.array([{}])})


def test_a_full_disk_leaves_the_last_one(manager):
    save(manager, 1, {"x": jnp.zeros(2)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000).astype(np.float32))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a write beyond is refused, as on a full disk
        with pytest.raises(ValueError, match=r"RESOURCE_EXHAUSTED|File too large"):
            save(manager, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.restore(manager, {"x": jnp.zeros(2)}).step == 1


def test_other_meshes(tmp_path):
    script = pathlib.Path(__file__).parent / "checkpoint_script.py"
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-W", "error", str(script), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
