"""Settings every test shares. Tests that need several devices start a process of their own (see distributed_test.py)."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


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
