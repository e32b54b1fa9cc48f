"""Updates on eight simulated devices, sharded over a mesh or mapped by pmap, against one device.

The devices exist only in a process of their own (`python tests/distributed_test.py OUT.npz`), so that no other test
pays for them; the tests here read what it saved.
"""

import contextlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import leafwise_test
import numpy as np
import optax
import pytest
from filelock import FileLock
from jax.sharding import NamedSharding, PartitionSpec
from lora_problem import lora_problem
from problems import (
    ROWS,
    VOCAB,
    Result,
    assert_same,
    packed,
    problems,
    rows,
    shared_prompt,
    small,
    three_updates,
    tiny,
    with_common_prompts,
)

from alignax import models, sharding, train
from alignax.algorithms import ppo, sft
from alignax.logprobs import last_score, token_logprobs, token_values

PROBLEMS = ("sft", "dpo", "kto", "grpo", "dapo", "reward_model", "ppo", "ppo_critic", "ppo_shared")
KEPT = ("host", "host8")  # state and reference in the host's memory, as they are and in eight bits
HOW = ("one", "data_4_tensor_2", "pmap")
RUNS = [(name, how) for name in PROBLEMS for how in HOW]
# rows over all devices is the mesh of fewest surprises: not paid for by every problem
RUNS += [("sft", "data_8"), ("dpo", "data_8")]
# with the transformer; packed two rows to a bundle; with a prompt in common, which is another batch
RUNS += [("kto of a transformer", how) for how in ("one", "data_4_tensor_2", "packed_mesh")]
RUNS += [("ppo_shared of a transformer", how) for how in ("one", "packed_mesh")]
RUNS += [("grpo of a transformer", how) for how in ("common", "common_mesh", "common_pmap")]
RUNS += [("lora", "one"), ("lora", "packed_mesh"), ("lora", "pmap")]
AMBIENT = ("dpo", "dapo", "kto", "grpo of a transformer", "kto of a transformer")  # on their meshes by `jax.set_mesh`


def of_name(name):
    if name == "lora":
        return lora_problem()
    name, transformer, _ = name.partition(" of a transformer")
    return problems(tiny if transformer else small)[name]


def on_mesh(*, ambient=False, **axes):
    """Parameters by the rules, rows over the data axis, one compilation; `ambient`: under `jax.set_mesh`."""
    mesh = sharding.make_mesh(**axes)
    compiled = []

    def place(tree):
        return jax.device_put(tree, sharding.shardings(tree, mesh, models.RULES))

    def run(update, state, batch, frozen, hyper):
        if not compiled:
            compiled.append(jax.jit(update))
        with jax.set_mesh(mesh) if ambient else contextlib.nullcontext():
            state, metrics = compiled[0](place(state), sharding.shard_batch(batch, mesh), place(frozen), hyper)
        params = state.params.get("backbone", state.params)
        projection = params["layers"]["attn"]["q"] if "layers" in params else params["up"]
        kernel = projection.get("kernel", projection.get("lora_b"))
        assert len(kernel.sharding.device_set) == 8
        if "tensor" in axes:
            assert kernel.sharding.spec == PartitionSpec(None, None, "tensor"), kernel.sharding
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


def one_device():
    """How `ppo_step` places nothing: what a network's parameters, and what the rows it reads, are given to."""
    return dict.fromkeys(("policy", "critic", "reference", "reward"), (jax.device_put, jax.device_put))


def each_its_own():
    """The policy over rows and columns, the critic whole, the reference over columns, the reward model over rows."""

    def on(mesh, rules, *axes):
        def place(tree):
            return jax.device_put(tree, sharding.shardings(tree, mesh, rules))

        return place, lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))

    mesh, whole = sharding.make_mesh(data=4, tensor=2), ((r".*", PartitionSpec()),)
    return {
        "policy": on(mesh, models.RULES, "data"),
        "critic": on(mesh, whole, "data"),
        "reference": on(sharding.make_mesh(tensor=8), models.RULES),
        "reward": on(sharding.make_mesh(data=8), whole, "data"),
    }


def ppo_step(place):
    """One step of PPO, each network in its place: scores, experience, both updates, a reference that follows."""
    policy, params = small()
    scalar, scalar_params = models.with_score(policy), models.add_score(policy, params, jax.random.key(1))
    optimizer = optax.sgd(0.1)
    networks = {
        "policy": train.TrainState.create(params, optimizer),
        "critic": train.TrainState.create(scalar_params, optimizer),
        "reference": jax.tree.map(lambda x: 0.9 * x, params),
        "reward": jax.tree.map(lambda x: 1.1 * x, scalar_params),
    }
    state, critic, reference, reward = (place[name][0](tree) for name, tree in networks.items())
    drawn = sft.Batch(**rows(ROWS))

    def read(name, function, params):
        """What a frozen network says, brought to where the policy's rows are."""
        return place["policy"][1](jax.jit(function)(params, place[name][1](drawn)))

    def learn(state, critic, drawn, ref_logp, scores):
        where = {"tokens": drawn.tokens, "segments": drawn.segments, "mask": drawn.mask}
        logp, values = token_logprobs(policy, state.params, **where), token_values(scalar, critic.params, **where)
        batch, said = ppo.experience(drawn, scores, logp=logp, ref_logp=ref_logp, values=values)
        state, metrics = train.make_update(ppo.make_loss(policy), optimizer)(state, batch)
        critic, critic_metrics = train.make_update(ppo.make_value_loss(scalar), optimizer)(critic, batch)
        return state, critic, batch, said | metrics | {f"critic/{name}": x for name, x in critic_metrics.items()}

    ref_logp = read("reference", lambda p, x: token_logprobs(policy, p, x.tokens, x.segments, mask=x.mask), reference)
    scores = read("reward", lambda p, x: last_score(scalar, p, x.tokens, x.segments), reward)
    new, new_critic, batch, metrics = jax.jit(learn)(state, critic, place["policy"][1](drawn), ref_logp, scores)
    follow = jax.jit(train.ema, out_shardings=jax.tree.map(lambda x: x.sharding, reference))
    followed = follow(reference, new.params, rate=0.3)
    jax.tree.map(assert_same_place, (state, critic, reference), (new, new_critic, followed))
    step = {"policy": new.params, "critic": new_critic.params, "reference": followed}
    return step | {"batch": batch._asdict(), "metrics": metrics}


def assert_same_place(before, after):
    assert after.sharding.is_equivalent_to(before.sharding, after.ndim), (before.sharding, after.sharding)


def main(out):
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # two programs with collectives may starve each other
    arrays = {}
    for name in dict.fromkeys(name for name, _ in RUNS):
        problem = of_name(name)
        runs = {
            "one": {},
            "data_8": {"run": on_mesh(data=8, ambient=name in AMBIENT)},
            "data_4_tensor_2": {"run": on_mesh(data=4, tensor=2, ambient=name in AMBIENT), "microbatches": 2},
            "pmap": {"run": mapped(), "microbatches": 2, "axis_name": "device"},
            "packed_mesh": {"run": on_mesh(data=4, tensor=2, ambient=name in AMBIENT), "microbatches": 2},
            "common": {},
            "common_mesh": {"run": on_mesh(data=4, tensor=2, ambient=True), "microbatches": 2},
            "common_pmap": {"run": mapped(), "axis_name": "device"},
        }
        for how in (how for which, how in RUNS if which == name):
            given = with_common_prompts(problem, 2) if how.startswith("common") else problem
            given = packed(given, 2) if how.startswith("packed") else given
            given = shared_prompt(given, 2) if how.startswith("common_") else given
            result = three_updates(given, **runs[how])
            leaves = jax.tree_util.tree_leaves_with_path(result)
            arrays |= {f"{name}/{how}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    for how, place in (("one", one_device()), ("apart", each_its_own())):
        leaves = jax.tree_util.tree_leaves_with_path(ppo_step(place))
        arrays |= {f"placed/{how}{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}
    for how in KEPT:
        for where, axes in (("one", {}), ("mesh", {"data": 4, "tensor": 2})):
            _, state, *_ = leafwise_test.three(how, **axes)
            moments = jax.tree.leaves(state.opt_state[1].leaves[-1])[-1]  # of up/kernel
            assert ("tensor" in moments.sharding.spec) == bool(axes)
            assert moments.sharding.memory_kind == "pinned_host"
            leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
            arrays |= {f"kept/{how}/{where}{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    arrays["gathered"], arrays["summed"] = collectives_of_the_head()
    np.savez(out, **arrays)


def collectives_of_the_head():
    """In the gradient of log-probabilities on a mesh: all-gathers, and the sums of what has the shape of the head."""
    (model, params), mesh = tiny(), sharding.make_mesh(data=4, tensor=2)
    params = jax.device_put(params, sharding.shardings(params, mesh, models.RULES))
    batch = sharding.shard_batch({name: jnp.asarray(x) for name, x in rows(ROWS).items()}, mesh)

    def loss(params, tokens, segments, mask):
        return jnp.sum(token_logprobs(model, params, tokens, segments, mask=mask))

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, **batch).compile().as_text()
    sums = [line for line in text.splitlines() if "all-reduce(" in line and f"f32[16,{VOCAB // 2}]" in line]
    return text.count("all-gather("), [len(sums), sum("while/body" in line for line in sums)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The arrays that the other process computed, by name: one process for all workers, two would starve each other."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "distributed.npz"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            compute(out)
    return dict(np.load(out))


def compute(out):
    tests = pathlib.Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(tests),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, __file__, out], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(saved):
    """{"problem/how": Result}."""

    def read(name, how):
        prefix, (_, params) = f"{name}/{how}", of_name(name).start()
        metrics = {}
        for key in saved:
            if key.startswith(f"{prefix}.metrics"):
                metrics[key.removeprefix(f"{prefix}.metrics['").removesuffix("']")] = saved[key]

        def tree(field):
            name = f"{prefix}.{field}"
            return jax.tree_util.tree_map_with_path(lambda path, _: saved[name + jax.tree_util.keystr(path)], params)

        return Result(tree("gradient"), tree("params"), metrics)

    return {f"{name}/{how}": read(name, how) for name, how in RUNS}


@pytest.mark.parametrize("name, how", [run for run in RUNS if run[1] not in ("one", "common")])
def test_eight_devices_equal_one(results, name, how):
    alone = "common" if how.startswith("common") else "one"
    assert_same(results[f"{name}/{how}"], results[f"{name}/{alone}"])


def test_networks_placed_apart_equal_one_device(saved):
    prefix = "placed/one"
    names = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
    assert len(names) > 30
    for name in names:
        np.testing.assert_allclose(
            saved[f"placed/apart{name}"], saved[prefix + name], rtol=2e-5, atol=2e-6, err_msg=name
        )
    before = small()[1]["head"]["kernel"]
    assert np.max(np.abs(saved["placed/one['policy']['head']['kernel']"] - before)) > 1e-3


@pytest.mark.parametrize("how", KEPT)
def test_a_state_on_the_host_of_a_mesh_equals_that_of_one_device(saved, how):
    prefix = f"kept/{how}/one"
    names = [name.removeprefix(prefix) for name in saved if name.startswith(prefix)]
    assert len(names) > 10
    for name in names:
        mesh, one = saved[f"kept/{how}/mesh{name}"], saved[prefix + name]
        if one.dtype == np.uint8:
            np.testing.assert_array_equal(mesh, one, err_msg=name)
        else:
            np.testing.assert_allclose(mesh, one, rtol=2e-5, atol=1e-6, err_msg=name)


def test_a_sharded_vocabulary_is_never_gathered_and_its_gradient_is_summed_once(saved):
    assert saved["gathered"] == 0
    assert saved["summed"].tolist() == [1, 0]  # behind the loop over blocks, not in it


def test_no_problem_is_forgotten():
    assert set(PROBLEMS) == set(problems())


if __name__ == "__main__":
    main(sys.argv[1])
