"""Updates on eight simulated devices, sharded over a mesh or mapped by pmap, against one device.

The devices exist only in a process of their own (`python tests/distributed_test.py OUT.npz`), so that no other test
pays for them; the tests here read what it saved.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from problems import Result, assert_same, problems, three_updates

from alignax import models, sharding

PROBLEMS = ("sft", "dpo", "grpo", "dapo", "reward_model", "ppo", "ppo_critic", "ppo_shared")
HOW = ("one", "data_8", "data_4_model_2", "pmap")


def on_mesh(**axes):
    """Parameters by the rules, rows over the data axis, one compilation."""
    mesh = sharding.make_mesh(**axes)
    compiled = []

    def place(tree):
        return jax.device_put(tree, sharding.shardings(tree, mesh, models.RULES))

    def run(update, state, batch, frozen, hyper):
        if not compiled:
            compiled.append(jax.jit(update))
        state, metrics = compiled[0](place(state), sharding.shard_batch(batch, mesh), place(frozen), hyper)
        kernel = state.params.get("backbone", state.params)["layers"]["attn"]["q"]["kernel"]
        assert len(kernel.sharding.device_set) == 8
        if "model" in axes:
            assert kernel.sharding.spec == PartitionSpec(None, None, "model"), kernel.sharding
        return state, metrics

    return run


def mapped():
    """jax.pmap over eight replicas."""
    compiled = []

    def run(update, state, batch, frozen, hyper):
        if not compiled:
            axes = (0, 0, None if frozen is None else 0, None)
            compiled.append(jax.pmap(update, axis_name="device", in_axes=axes))
        frozen = None if frozen is None else sharding.replicate(frozen)
        state, metrics = compiled[0](sharding.replicate(state), sharding.split_rows(batch, 8), frozen, hyper)
        return sharding.unreplicate(state), sharding.unreplicate(metrics)

    return run


def main(out):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    arrays = {}
    for name in PROBLEMS:
        problem = problems()[name]
        results = {
            "one": three_updates(problem),
            "data_8": three_updates(problem, run=on_mesh(data=8)),
            "data_4_model_2": three_updates(problem, run=on_mesh(data=4, model=2), microbatches=2),
            "pmap": three_updates(problem, run=mapped(), microbatches=2, axis_name="device"),
        }
        for how, result in results.items():
            leaves = jax.tree_util.tree_leaves_with_path(result)
            arrays |= {f"{name}/{how}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    np.savez(out, **arrays)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{"problem/how": Result} as the other process computed them."""
    out = tmp_path_factory.mktemp("distributed") / "results.npz"
    tests = pathlib.Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(tests),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, __file__, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = np.load(out)

    def read(name, how):
        prefix, (_, params) = f"{name}/{how}", problems()[name].start()
        metrics = {}
        for key in saved.files:
            if key.startswith(f"{prefix}.metrics"):
                metrics[key.removeprefix(f"{prefix}.metrics['").removesuffix("']")] = saved[key]

        def tree(field):
            name = f"{prefix}.{field}"
            return jax.tree_util.tree_map_with_path(lambda path, _: saved[name + jax.tree_util.keystr(path)], params)

        return Result(tree("gradient"), tree("params"), metrics)

    return {f"{name}/{how}": read(name, how) for name in PROBLEMS for how in HOW}


@pytest.mark.parametrize("how", HOW[1:])
@pytest.mark.parametrize("name", PROBLEMS)
def test_eight_devices_equal_one(results, name, how):
    assert_same(results[f"{name}/{how}"], results[f"{name}/one"])


def test_no_problem_is_forgotten():
    assert set(PROBLEMS) == set(problems())


if __name__ == "__main__":
    main(sys.argv[1])
