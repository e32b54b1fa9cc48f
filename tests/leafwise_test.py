"""State and reference in the host's memory: the CPU has it as a memory of its own, so places and results are real here.

What needs an accelerator, that the device holds one leaf's state at a time, is seen in programs lowered for it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from alignax import leafwise, precision, sharding, train
from alignax.types import Mean, Term

HOST = r"^opt_state/"


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


RNG = np.random.default_rng(0)
PARAMS = {"up": {"kernel": RNG.normal(size=(4, 8))}, "down": {"kernel": RNG.normal(size=(8, 3)), "bias": np.ones(3)}}
PARAMS = jax.tree.map(lambda x: jnp.asarray(0.5 * x, jnp.float32), PARAMS)
BATCH = RNG.normal(size=(8, 4)).astype(np.float32)


def loss_fn(params, batch, frozen, hyper):
    """Mean squared distance of two layers to those of a reference."""
    del hyper

    def network(p):
        return jnp.tanh(batch @ p["up"]["kernel"]) @ p["down"]["kernel"] + jax.lax.expand_dims(p["down"]["bias"], (0,))

    square = jnp.sum((network(params) - network(frozen["reference"])) ** 2, axis=-1)
    return {"square": Term(1.0, Mean(jnp.sum(square), jnp.asarray(float(len(batch)))))}, {}


@functools.cache
def three(how, **axes):
    """Three updates in two parts: "device", "leaves", "host" (state and reference), "host8" (in eight bits).

    On one device, or a mesh of these axes (`tests/distributed_test.py`).
    """
    mesh = sharding.make_mesh(**axes) if axes else sharding.make_mesh(jax.devices()[:1], data=1)
    adam = optax.adamw(0.1)
    adam = precision.compressed(adam, bits=8, block=4, smallest=8) if how == "host8" else adam
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), adam if how == "device" else leafwise.leafwise(adam))
    host = how.startswith("host")

    def create(params):
        return train.TrainState.create(params, optimizer)

    rules = ((r"up/kernel$", PartitionSpec(None, "tensor")), (r".*", PartitionSpec()))
    start = state = sharding.born_sharded(create, mesh, rules, host=HOST if host else None)(PARAMS)
    where = sharding.shardings(PARAMS, mesh, rules, host="" if host else None)
    frozen = {"reference": jax.device_put(jax.tree.map(lambda x: -x, PARAMS), where)}
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=2), donate_argnums=0)
    for _ in range(3):
        state, metrics = update(state, sharding.shard_batch(BATCH, mesh), frozen)
    copy = jax.tree.map(jnp.copy, state)
    kept, said = update(copy, BATCH * np.nan, frozen) if how in ("host", "leaves") else (None, None)
    return start, state, frozen, metrics, kept, said


def test_results_are_those_of_the_device():
    _, expected, *_ = three("device")
    for how in ("leaves", "host"):
        _, state, *_ = three(how)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), state.params, expected.params)
        found, adam = state.opt_state[1].leaves, expected.opt_state[1][0]
        for i, (mu, nu) in enumerate(zip(jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu), strict=True)):
            np.testing.assert_allclose(jax.tree.leaves(found[i][0].mu)[0], mu, rtol=0, atol=1e-6)
            np.testing.assert_allclose(jax.tree.leaves(found[i][0].nu)[0], nu, rtol=0, atol=1e-8)
            assert found[i][0].count == 3


def test_state_and_reference_stay_where_they_were_put():
    for how in ("host", "host8"):
        start, state, frozen, *_ = three(how)
        assert kinds(state.params) == kinds(state.step) == {"device"} and kinds(frozen) == {"pinned_host"}
        axes = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
        assert kinds(axes) == {"pinned_host"} and all(x.is_deleted() for x in jax.tree.leaves(start.opt_state))
        assert kinds([x for x in jax.tree.leaves(state.opt_state) if not x.ndim]) == {"device"}
    assert any(x.dtype == jnp.uint8 for x in axes)
    for how in ("device", "leaves"):
        assert kinds(three(how)[1].opt_state) == {"device"}


@pytest.mark.parametrize("how", ["host", "leaves"])
def test_a_step_that_is_not_finite_leaves_the_state_alone(how):
    _, state, _, _, kept, said = three(how)
    assert said["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, (kept.params, kept.opt_state), (state.params, state.opt_state))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_for_accelerators_fetch_one_leaf_after_the_other(platform):
    mesh = sharding.make_mesh(data=-1)
    params = {name: jnp.ones((4, 4)) for name in "abc"}
    optimizer = leafwise.leafwise(optax.adam(1e-3), ahead=0)
    state = sharding.born_sharded(optimizer.init, mesh, [("", PartitionSpec())], host="")(params)
    lowered = jax.jit(optimizer.update).trace(params, state, params, usable=True).lower(lowering_platforms=(platform,))
    lines = lowered.as_text().splitlines()
    marks = [line for line in lines if "annotate_device_placement" in line or "optimization_barrier" in line]
    order = "".join("|" if "barrier" in line else "<" if '"device"' in line else ">" for line in marks)
    assert order == "|<<>>" * 3  # wait, fetch both moments, return both
    arguments = next(line for line in lines if "@main" in line)
    assert arguments.count('memory_kind = "pinned_host"') == 12  # two moments of three leaves, in and out


def test_clipping_of_all_leaves_together_is_refused_inside():
    inside = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    with pytest.raises(ValueError, match="depends on several leaves; expected an optimizer that updates every leaf"):
        jax.eval_shape(leafwise.leafwise(inside).init, {"a": jnp.ones(2), "b": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="ahead=-1; expected 0 or more"):
        leafwise.leafwise(optax.sgd(1.0), ahead=-1)
