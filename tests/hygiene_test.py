"""The repository as a whole: no traces of one machine, a licence, and checks that are really on."""

import os
import pathlib
import re
import stat
import subprocess

import jax.numpy as jnp
import jaxtyping
import pytest

from alignax.types import Response

ROOT = pathlib.Path(__file__).parents[1]

# Where absolute paths of somebody's machine begin. Written without their slashes, or this file would be found.
HOMES = ("home", "root", "work", "tmp", "Users", "mnt", "opt", "scratch", "private")
MACHINE_PATH = re.compile(r"(?<![\w.:/~$})\]-])/(?:" + "|".join(HOMES) + r")/\w")


def test_the_pattern_knows_a_path_from_a_link():
    assert MACHINE_PATH.search('open("' + "/ho" + 'me/someone/model")') and MACHINE_PATH.search("=/t" + "mp/x")
    assert not MACHINE_PATH.search("https://example.org/work/paper and ../work/x and {root}/tmp/y")


def test_no_file_names_a_path_of_one_machine(tracked):
    found = []
    for name in tracked:
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # binary, or deleted and not yet committed
            continue
        found += [f"{name}:{n}" for n, line in enumerate(text.splitlines(), start=1) if MACHINE_PATH.search(line)]
    assert not found, found


def test_nothing_large_is_tracked(tracked):
    sizes = {name: (ROOT / name).stat().st_size for name in tracked if (ROOT / name).is_file()}
    assert not {name: size for name, size in sizes.items() if size > 1_000_000}


def test_licence_and_ci():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & stat.S_IXUSR


def test_shapes_in_annotations_are_enforced():
    """The checker of annotations works in every pytest process, those of xdist included."""
    rows, row = jnp.zeros((2, 3)), jnp.zeros(3)
    assert Response(rows, None, rows).sum.shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError):
        _ = Response(row, None, row).sum


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        _ = jnp.zeros((2, 3)) + jnp.zeros(3)


STUB = """#!/usr/bin/env bash
# Stands for python3, and in the environment that it "creates" for every program.
name=$(basename "$0")
[ "$1 $2" = "-m venv" ] && {
  mkdir -p "$3/bin"
  for program in python pip pytest ruff pyright; do cp "$0" "$3/bin/$program"; done
  echo "PATH=$3/bin:\\$PATH" > "$3/bin/activate"
}
[ "$name" = python3 ] || echo "$name $*" >> "$CALLS"
[ "$name" = pytest ] && echo "=== $CLOSING in 1.00s ==="
[ "$name" != "$FAILS" ] || exit "$STATUS"
"""


@pytest.mark.parametrize(
    "closing, fails, status, expected",
    [
        ("3 passed, 1 skipped", "", 0, 0),
        ("1 failed, 3 passed", "pytest", 1, 1),
        ("no tests ran", "pytest", 5, 1),
        ("10 skipped", "", 0, 1),
        ("3 passed", "pip", 1, 1),
        ("3 passed", "ruff", 1, 1),
        ("3 passed", "pyright", 1, 1),
    ],
)
def test_ci_fails_when_anything_does(tmp_path, closing, fails, status, expected):
    """.ci/run itself, with stand-ins for Python and all that it installs."""
    stub = tmp_path / "python3"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "CLOSING": closing}
    env |= {"FAILS": fails, "STATUS": str(status), "TMPDIR": str(tmp_path)}
    result = subprocess.run([ROOT / ".ci" / "run"], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == expected, result.stdout + result.stderr
    last = "pytest printed no closing line" if fails == "pip" else f"=== {closing} in 1.00s ==="
    assert result.stdout.splitlines()[-1] == last
    assert calls.read_text().splitlines()[1] == "pip install -e .[test]"
    assert calls.read_text().splitlines()[-2:] == ["ruff check .", "pyright "]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calls", "python3"], "it cleans up after itself"
