"""The axes fsdp, sequence and expert; data and tensor are those of tests/distributed_test.py."""

import os
import pathlib
import subprocess
import sys


def test_every_axis_gives_what_one_device_gives():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    script = pathlib.Path(__file__).with_name("axes_script.py")
    env = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
