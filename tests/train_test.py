"""Updates of a model of two numbers, whose gradients are written out in numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import problems, tiny

from alignax import train
from alignax.types import Max, Mean, Term

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(8, 3)).astype(np.float32), "mask": RNG.random((8, 3)) < 0.6}
BATCH["mask"][0] = False
PARAMS = {"w": jnp.array(0.5), "b": jnp.array(-0.2)}
RATE = 0.1


def loss_fn(params, batch, frozen, hyper):
    """mean over tokens of (w x + b)^2, and scale times the mean over non-empty rows of their sums of w x."""
    y = params["w"] * batch["x"] + params["b"]
    tokens = Mean(jnp.sum(jnp.where(batch["mask"], y**2, 0)), jnp.sum(batch["mask"]).astype(jnp.float32))
    rows = jnp.any(batch["mask"], axis=1)
    row_sums = Mean(jnp.sum(jnp.where(batch["mask"], y - params["b"], 0)), jnp.sum(rows).astype(jnp.float32))
    terms = {"square": Term(1.0, tokens), "linear": Term(hyper.get("scale", 0.0), row_sums)}
    return terms, {"largest": Max(jnp.max(y)), "mean_x": Mean(jnp.sum(batch["x"]), jnp.array(float(batch["x"].size)))}


def expected_update(scale):
    x, mask = BATCH["x"].astype(np.float64), BATCH["mask"]
    y = 0.5 * x - 0.2
    loss = (y[mask] ** 2).mean() + scale * 0.5 * x[mask].sum() / mask.any(1).sum()
    w = (2 * y * x)[mask].mean() + scale * x[mask].sum() / mask.any(1).sum()
    b = (2 * y)[mask].mean()
    return loss, {"w": 0.5 - RATE * w, "b": -0.2 - RATE * b}, np.hypot(w, b)


def state(optimizer, params=PARAMS):
    return train.TrainState.create(params, optimizer)


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_the_update_is_that_of_the_whole_batch(microbatches, scale):
    optimizer = optax.sgd(RATE)
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=microbatches))
    new, metrics = update(state(optimizer), BATCH, None, {"scale": scale})
    loss, params, norm = expected_update(scale)
    for name in ("w", "b"):
        np.testing.assert_allclose(new.params[name], params[name], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["largest"], (0.5 * BATCH["x"] - 0.2).max(), rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_x"], BATCH["x"].mean(), rtol=1e-5)
    assert new.step == 1 and new.skipped == 0 and metrics["skipped"] == 0


def test_pmap_on_one_device():
    optimizer = optax.sgd(RATE)
    update = train.make_update(loss_fn, optimizer, axis_name="device")
    one = jax.tree.map(lambda x: x[None], (state(optimizer), BATCH))
    new, _ = jax.pmap(update, axis_name="device", in_axes=(0, 0, None, None))(*one, None, {"scale": 2.0})
    np.testing.assert_allclose(new.params["w"][0], expected_update(2.0)[1]["w"], rtol=1e-6)


def test_statistics_are_those_of_the_whole_batch_and_constant():
    def statistics(params, batch, frozen, hyper):
        return {"centre": Mean(jnp.sum(params["w"] * batch["x"]), jnp.array(float(batch["x"].size)))}

    def centred(params, batch, frozen, hyper):
        value = params["w"] * batch["x"] - hyper["centre"]
        return {"square": Term(1.0, Mean(jnp.sum(value**2), jnp.array(float(value.size))))}, {}

    x = BATCH["x"].astype(np.float64)
    gradient = (2 * (0.5 * x - (0.5 * x).mean()) * x).mean()  # the centre is not differentiated
    for microbatches in (1, 4):
        optimizer = optax.sgd(RATE)
        update = jax.jit(train.make_update(centred, optimizer, microbatches=microbatches, statistics=statistics))
        new, _ = update(state(optimizer), BATCH)
        np.testing.assert_allclose(new.params["w"], 0.5 - RATE * gradient, rtol=1e-6)


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    optimizer = optax.adam(RATE)
    update = jax.jit(train.make_update(loss_fn, optimizer))
    before = state(optimizer)
    bad = {**BATCH, "x": np.where(BATCH["mask"], np.inf, 0).astype(np.float32)}
    after, metrics = update(before, bad)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert after.step == 1 and after.skipped == 1 and metrics["skipped"] == 1
    again, metrics = update(after, BATCH)
    assert again.skipped == 1 and metrics["skipped"] == 0 and again.params["w"] != before.params["w"]


def test_steps_left_out_in_a_row_are_counted_and_end_the_run():
    """A loss that is NaN at updates 1, 3, 4 and 5: at a limit of three the last of them stops, and says why."""
    optimizer = optax.sgd(RATE)
    update = jax.jit(train.make_update(loss_fn, optimizer, microbatches=2))
    now, in_a_row = state(optimizer), []
    for step, scale in enumerate((np.nan, 0.0, np.nan, np.nan, np.nan), start=1):
        now, metrics = update(now, BATCH, None, {"scale": scale})
        in_a_row.append(int(metrics["skipped/in_a_row"]))
        if step < 5:
            train.stop_after_skips(step, metrics, limit=3)
    assert in_a_row == [1, 0, 1, 2, 3] and now.skipped_in_a_row == 3 and now.skipped == 4
    with pytest.raises(FloatingPointError, match=r"step 5: skipped/in_a_row is 3, the limit is 3.*loss nan, grad_norm"):
        train.stop_after_skips(5, metrics, limit=3)
    of_two = {f"critic/{name}": value for name, value in metrics.items()} | {"skipped/in_a_row": 0.0, "loss": 1.0}
    with pytest.raises(FloatingPointError, match=r"critic/skipped/in_a_row is 3.*critic/loss nan"):
        train.stop_after_skips(5, of_two, limit=3)
    train.stop_after_skips(5, {"loss": jnp.nan})  # says nothing of steps left out
    with pytest.raises(ValueError, match="limit=0; expected at least 1"):
        train.stop_after_skips(5, metrics, limit=0)


def test_bfloat16_parameters_keep_their_dtype():
    optimizer = optax.sgd(RATE)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    new, metrics = jax.jit(train.make_update(loss_fn, optimizer, microbatches=2))(state(optimizer, half), BATCH)
    assert new.params["w"].dtype == jnp.bfloat16 and metrics["loss"].dtype == jnp.float32
    np.testing.assert_allclose(float(new.params["w"]), expected_update(0.0)[1]["w"], rtol=1e-2)


def test_the_optimizer_keeps_its_dtypes_too_and_compiles_once():
    optimizer = optax.adamw(1e-2)
    traces = []

    def counted(*args):
        traces.append(1)
        return loss_fn(*args)

    update = jax.jit(train.make_update(counted, optimizer))
    first = state(optimizer, jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS))
    second, _ = update(first, BATCH)
    seen = len(traces)
    third, _ = update(second, BATCH)
    assert jax.tree.map(lambda x: x.dtype, third) == jax.tree.map(lambda x: x.dtype, first)
    assert len(traces) == seen


def test_a_step_of_infinite_length_is_left_out():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=jnp.nan)
    after, metrics = train.make_update(loss_fn, optimizer)(state(optimizer), BATCH)
    assert metrics["skipped"] == 1 and after.params["w"] == PARAMS["w"]


def test_counting_first_costs_no_forward_pass():
    problem, (model, params) = problems()["grpo"], tiny()
    loss_fn, batch = problem.make_loss(model), jax.tree.map(jnp.asarray, problem.batch)

    def plain(params):
        terms, _ = loss_fn(params, batch, problem.frozen, problem.hyper)
        return sum(term.weight * term.mean.value() for term in terms.values())

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    optimizer = optax.sgd(RATE)
    args = (state(optimizer, params), batch, problem.frozen, problem.hyper)
    assert flops(train.make_update(loss_fn, optimizer), *args) < 1.05 * flops(jax.grad(plain), params)


def test_a_donated_state_is_reused():
    optimizer = optax.adam(RATE)
    before = state(optimizer, jax.tree.map(jnp.copy, PARAMS))
    jax.jit(train.make_update(loss_fn, optimizer), donate_argnums=0)(before, BATCH)
    assert before.params["w"].is_deleted() and before.step.is_deleted() and before.skipped.is_deleted()


@pytest.mark.parametrize("microbatches", [3, 0])
def test_bad_microbatches_are_refused(microbatches):
    with pytest.raises(ValueError, match="microbatches"):
        train.make_update(loss_fn, optax.sgd(1), microbatches=microbatches)(state(optax.sgd(1)), BATCH)


def test_measures_of_parts_merge_into_those_of_the_whole():
    measure = train.make_measure(loss_fn)
    parts = [jax.tree.map(lambda x, i=i: x[i : i + n], BATCH) for i, n in ((0, 3), (3, 5))]
    merged = train.merge(measure(PARAMS, part) for part in parts)
    np.testing.assert_allclose(merged["loss/square"], expected_update(0.0)[0], rtol=1e-6)
    np.testing.assert_allclose(merged["largest"], (0.5 * BATCH["x"] - 0.2).max(), rtol=1e-6)
    with pytest.raises(ValueError, match="nothing to merge"):
        train.merge([])


def test_minibatches_are_one_permutation(key):
    rows = {"a": jnp.arange(12), "b": jnp.arange(12)[:, None] * 2}
    parts = list(train.minibatches(key, rows, 3))
    seen = jnp.concatenate([part["a"] for part in parts])
    assert len(parts) == 3 and not jnp.array_equal(seen, jnp.arange(12))
    np.testing.assert_array_equal(jnp.sort(seen), jnp.arange(12))
    for part in parts:
        np.testing.assert_array_equal(part["b"][:, 0], 2 * part["a"])
    other = jnp.concatenate([part["a"] for part in train.minibatches(jax.random.key(1), rows, 3)])
    assert not jnp.array_equal(seen, other)
    with pytest.raises(ValueError, match="12 rows do not divide into 5 minibatches"):
        train.minibatches(key, rows, 5)
    with pytest.raises(ValueError, match=r"leaves have \[4, 12\] rows"):
        train.minibatches(key, {**rows, "c": jnp.zeros(4)}, 2)


def test_ema_vectors(shared):
    vectors = json.loads((shared / "spec" / "vectors_online.json").read_text())
    vectors = [vector for vector in vectors if vector["function"] == "ema_update"]
    assert len(vectors) == 2
    for vector in vectors:
        x = {name: jnp.array(value) for name, value in vector["inputs"].items()}
        result = train.ema(x["target"], x["source"], rate=vector["hyperparameters"]["eta"])
        np.testing.assert_allclose(result, vector["expected"], rtol=1e-6)
    assert train.ema(jnp.zeros(2, jnp.bfloat16), jnp.ones(2), rate=0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 100])
def test_rows_in_parts_are_all_rows(size):
    """8 rows: sizes that divide them and sizes that do not."""
    most = []

    def fn(params, rows):
        most.append(len(rows["x"]))
        return {"sum": params["w"] * jnp.sum(rows["x"], axis=1), "per_token": jnp.where(rows["mask"], rows["x"], 0.0)}

    found = jax.jit(train.in_parts(fn, size))(PARAMS, BATCH)
    assert max(most) <= size
    np.testing.assert_allclose(found["sum"], 0.5 * BATCH["x"].sum(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found["per_token"], np.where(BATCH["mask"], BATCH["x"], 0))


def test_parts_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="in_parts: size=0; expected at least 1"):
        train.in_parts(lambda params, rows: rows, 0)
