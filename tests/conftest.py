"""Settings every test shares. Tests that need several devices start a process of their own."""

import gc
import importlib.metadata
import os
import pathlib
import subprocess

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny programs spend their time in the compiler, not on the processor: half of it goes without optimisation, half of
# the rest without fusion emitters and without cutting every program into parts for as many threads, which only this
# version is asked to leave out (an unknown flag ends the process).
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def key():
    """A fixed random key."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def shared():
    """The folder of real models, data and oracles beside the checkout; the test is skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real models and data in {SHARED}, which is absent here")
    return SHARED


@pytest.fixture(scope="session")
def tracked():
    """The files under version control, as paths from the root; the test is skipped outside a checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("needs a git checkout")
    return listing.stdout.strip("\0").split("\0")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny random model with a tokenizer of bytes, as a Hugging Face folder."""
    from tiny_folder import save_tiny_model

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_tiny_model(folder)
    return folder


@pytest.fixture
def bare(monkeypatch):
    """Scripts print no sampled texts and draw no curves, a third of a short run: for tests of something else."""
    import common

    monkeypatch.setattr(common, "make_show", lambda *args, **options: lambda *shown: None)
    monkeypatch.setattr(common, "save_curves", lambda path, curves: None)


def pytest_generate_tests(metafunc):
    """Tests of `properties.Properties` run for each of the rows that their class names."""
    if "row" in metafunc.fixturenames and hasattr(metafunc.cls, "rows"):
        rows = metafunc.cls.rows
        metafunc.parametrize("row", rows.values(), ids=rows.keys(), scope="class")


def pytest_collection_modifyitems(config, items):
    """Leaves out the tests of `properties.Properties` that say nothing of their row."""
    nothing = [
        item
        for item in items
        if (which := getattr(getattr(item, "function", None), "of_rows", None))
        and not which(item.callspec.params["row"])
    ]
    if nothing:
        config.hook.pytest_deselected(items=nothing)
        left_out = set(map(id, nothing))
        items[:] = [item for item in items if id(item) not in left_out]


def pytest_collection_finish():
    """No full garbage collections but those below: each visits all that was ever traced, a twentieth of the suite."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 20, 100_000)


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Forgets compiled programs between modules when there are many: a process may hold only so many mappings.

    Each program on the CPU is a few of them, and at 65,530 the next compilation ends in a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
