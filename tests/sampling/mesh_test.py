"""Sampling with parameters over columns and prompts over rows of a mesh, in a process that has eight devices."""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def report():
    script = pathlib.Path(__file__).with_name("mesh_script.py")
    # as users compile: which collectives are left is a matter of optimisation
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **flags})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("settings", ["plain", "bent"])
def test_rows_are_those_of_one_device(report, settings):
    """Tokens are compared by the script."""
    assert report[settings]["logp"] <= 1e-5


@pytest.mark.parametrize("settings", ["plain", "bent"])
def test_every_device_keeps_its_rows(report, settings):
    fields = ["tokens", "segments", "mask", "logp", "lengths", "truncated", "processed_logp"]
    assert report[settings]["sharded"] == fields


def test_no_step_gathers_caches_tokens_or_logits(report):
    """What moves between devices, sums aside, is the weight of each block of 128 tokens of the vocabulary."""
    blocks_of_a_device = 16 // 4 * 512 // 128
    assert report["moved"]
    for size, source in report["moved"]:
        assert size <= blocks_of_a_device, (size, source)
        assert "scatter" not in source and "attn" not in source


def test_an_engine_on_the_mesh_draws_the_same(report):
    """Its prompts come in another order, with the row ids they had; tokens are compared by the script."""
    assert report["engine"] <= 1e-5
