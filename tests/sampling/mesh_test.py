"""Sampling with parameters over columns and prompts over rows of a mesh, in a process that has eight devices."""

import json
import os
import pathlib
import subprocess
import sys


def report():
    script = pathlib.Path(__file__).with_name("mesh_script.py")
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
    flags |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, **flags})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_mesh_draws_what_one_device_draws():
    """One test, since one process serves all of it; tokens are compared by the script."""
    found = report()
    fields = ["tokens", "segments", "mask", "logp", "lengths", "truncated", "processed_logp"]
    for settings in ("plain", "bent"):
        assert found[settings]["logp"] <= 1e-5, settings
        assert found[settings]["sharded"] == fields, settings  # every device keeps its rows
    assert found["engine"] <= 1e-5  # whose prompts came in another order, with the row ids they had
    # what moves between devices, sums aside, is the weight of each block of 128 tokens of the vocabulary
    blocks_of_a_device = 16 // 4 * 512 // 128
    assert found["moved"]
    for size, source in found["moved"]:
        assert size <= blocks_of_a_device, (size, source)
        assert "scatter" not in source and "attn" not in source
