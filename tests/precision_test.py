"""bfloat16 computing over float32 masters, and optimizer state in fewer bits, against numpy and float32."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from problems import problems, tiny

from alignax import models, precision, sharding, train
from alignax.types import Mean, Term

KEY = jax.random.key(0)
encode, decode = (jax.jit(function, static_argnums=2) for function in (precision.encode, precision.decode))
round_bfloat16 = jax.jit(precision.round_bfloat16)


# bfloat16 computing


@functools.cache
def gradient(name, dtype):
    """Compiled `(scale) -> (loss, gradients)` of a problem whose model computes in `dtype`; `scale` is its loss's."""
    problem, (model, params) = problems()[name], tiny()
    loss_fn = problem.make_loss(models.transformer(dataclasses.replace(model.config, dtype=dtype)))

    def scaled(params, batch, frozen, hyper):
        hyper, scale = dict(hyper), hyper["scale"]
        terms, metrics = loss_fn(params, batch, frozen, {k: v for k, v in hyper.items() if k != "scale"})
        return {key: term._replace(weight=term.weight * scale) for key, term in terms.items()}, metrics

    keep = optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda g, state, p=None: (g, g))
    optimizer = optax.chain(keep, optax.sgd(1e-5))
    update = jax.jit(train.make_update(scaled, optimizer))

    # A ratio on the other side of its clip has another gradient, however close: that is not what is compared here.
    hyper = problem.hyper | ({"clip_low": 0.99, "clip_high": 99.0} if name == "grpo" else {})

    def run(scale):
        state = train.TrainState.create(params, optimizer)
        state, metrics = update(state, problem.batch, problem.frozen, hyper | {"scale": scale})
        return metrics, state.opt_state[0], state.params

    return run


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_bfloat16_computing_keeps_losses_gradients_and_masters_float32(name):
    half, grads, params = gradient(name, jnp.bfloat16)(1.0)
    full, expected, _ = gradient(name, jnp.float32)(1.0)
    assert {x.dtype for x in jax.tree.leaves((half, grads, params))} == {jnp.dtype("float32")}
    assert half["loss"] != full["loss"]  # it did compute in bfloat16, of 8 bits:
    np.testing.assert_allclose(half["loss"], full["loss"], rtol=2**-7, atol=2**-7)
    flat, flat_expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (grads, expected))
    assert np.linalg.norm(flat - flat_expected) < 0.05 * np.linalg.norm(flat_expected)
    # Masters take steps that bfloat16 would round away.
    start, moved = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (tiny()[1], params))
    rounded = (start != moved) & (start.astype(jnp.bfloat16) == moved.astype(jnp.bfloat16))
    assert rounded.mean() > 0.3


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_no_loss_scale_is_needed(name):
    """Gradients of a loss times 2^-40 are the same bits times 2^-40: in float16 they would be zeros."""
    run = gradient(name, jnp.bfloat16)
    (_, grads, _), (_, tiny_grads, _) = run(1.0), run(2.0**-40)
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(tiny_grads))
    assert 0 < largest < 2.0**-30
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y) * 2.0**40), grads, tiny_grads)


# Rounding


def test_bfloat16_is_rounded_to_a_neighbour_and_keeps_the_mean():
    x = np.float32([1.003, -1.003, 3.14159, 1e-20, 0.0, 2.0])
    drawn = np.asarray(round_bfloat16(KEY, np.tile(x, (20_000, 1))), np.float32)
    word = x.view(np.uint32)
    toward_zero, away = ((word >> 16 << 16).view(np.float32), ((word >> 16) + 1 << 16).view(np.float32))
    assert np.all((drawn == toward_zero) | (drawn == away))
    np.testing.assert_allclose(drawn.mean(0), x, rtol=1e-4)  # the nearest bfloat16 of 1.003 is 1.0
    assert np.all(drawn[:, 4:] == x[4:])  # what it holds exactly it keeps
    odd = np.float32([np.inf, -np.inf, np.nan, 3.3e38])
    np.testing.assert_allclose(np.asarray(round_bfloat16(KEY, odd), np.float32), odd, rtol=2**-7)


def levels_of(block):
    """All that eight bits hold of a block: written from the docstring."""
    count = 127 if (block < 0).any() else 255
    steps = np.abs(block).max() * 2.0 ** (-24 * (count - np.arange(1.0, count + 1)) / count)
    return np.concatenate([-steps[::-1], [0.0], steps]) if count == 127 else np.concatenate([[0.0], steps])


@pytest.mark.parametrize("squared", [False, True])
def test_eight_bits_are_neighbouring_levels_and_keep_the_mean(squared):
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], (2, 40)) * 2.0 ** rng.uniform(-10, 0, (2, 40))).astype(np.float32)
    x = x**2 if squared else x
    many = np.tile(x, (3000, 1, 1))
    code, scales = encode(KEY, many, 16)
    assert code.shape == many.shape and code.dtype == jnp.uint8 and scales.shape == (3000, 2, 3)  # 16, 16 and 8
    drawn = np.asarray(precision.decode(code, scales, 16))
    step = 2 ** (24 / (255 if squared else 127)) - 1
    assert np.abs(drawn / x - 1).max() < step + 1e-5 and step < (0.07 if squared else 0.15)
    np.testing.assert_allclose(drawn.mean(0), x, rtol=6 * step / 2 / 3000**0.5)
    for row in range(2):
        for start in (0, 16, 32):
            here = slice(start, start + 16)
            levels = levels_of(x[row, here])
            nearest = np.abs(drawn[:, row, here, None] - levels).min(-1)
            assert np.all(nearest <= 2e-5 * np.abs(drawn[:, row, here]))
            largest = np.abs(x[row, here]).argmax()
            np.testing.assert_array_equal(drawn[:, row, start + largest], x[row, start + largest])


def test_small_second_moments_survive_as_they_do_not_on_a_linear_scale():
    """One gradient of 1 among gradients of 0.01: their squares are 1e-4 of the block's largest."""
    second = np.full((1, 128), 1e-4, np.float32)
    second[0, 0] = 1.0
    linear = np.round(second * 255) / 255
    assert linear[0, 1] == 0  # and Adam would divide by its epsilon
    found = decode(*encode(KEY, second, 128), 128)
    np.testing.assert_allclose(found, second, rtol=0.07)
    second[0, 1:] = 1e-12  # below the lowest level, 2^-24 of the largest: raised, and zero only where it was
    second[0, 5] = 0
    found = np.asarray(decode(*encode(KEY, second, 128), 128))[0]
    assert found[5] == 0 and np.all(found[6:] > 5e-8) and np.all(found[6:] < 7e-8)


def test_a_second_moment_of_decay_0_999_moves_only_when_rounded_at_random():
    """v from 1 towards 0.25 in 2000 steps; the closed form is 0.25 + 0.75 * 0.999^2000 = 0.351."""
    expected = 0.25 + 0.75 * 0.999**2000
    start = np.ones((1, 512), np.float32)
    start[:, 0] = 1.7  # blocks need not be of one value

    def steps(put, get):
        def one(i, kept):
            return put(jax.random.fold_in(KEY, i), 0.999 * get(kept) + 0.001 * 0.25)

        return np.asarray(jax.jit(lambda x: get(jax.lax.fori_loop(0, 2000, one, put(KEY, x))))(start))[:, 1:]

    nearest = steps(lambda key, x: x.astype(jnp.bfloat16), lambda x: x.astype(jnp.float32))
    assert np.all(nearest == 1.0)
    random = steps(precision.round_bfloat16, lambda x: x.astype(jnp.float32))
    np.testing.assert_allclose(random.mean(), expected, rtol=0.01)
    assert random.std() < 0.1 * expected
    eight = steps(lambda key, x: precision.encode(key, x, 128), lambda kept: precision.decode(*kept, 128))
    np.testing.assert_allclose(eight.mean(), expected, rtol=0.02)
    assert eight.std() < 0.25 * expected


# The wrapped optimizer

SHAPES = {"layers": {"up": {"kernel": (2, 32, 192), "bias": (2, 192)}}, "embed": {"embedding": (64, 64)}}
PARAMS = jax.tree.map(lambda shape: np.ones(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("bits", [16, 8])
def test_bytes_are_what_they_should_be(bits):
    state = jax.eval_shape(precision.compressed(optax.adamw(1e-3), bits=bits, block=128).init, PARAMS)
    kernel, bias, embedding = 2 * 32 * 192, 2 * 192, 64 * 64
    moment = (kernel + embedding) * bits // 8 + 4 * bias
    if bits == 8:
        moment += 4 * (2 * 32 * 2 + 64 * 1)  # 192 values are two blocks, 64 are one
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) == 2 * moment + 2 * 4  # and two counts


def test_state_is_sharded_as_its_parameters_are():
    optimizer = precision.compressed(optax.adamw(1e-3), bits=8, block=64)
    state = jax.eval_shape(lambda p: train.TrainState.create(p, optimizer), PARAMS)
    for model in (3, 2):  # 192 columns, 3 blocks: these divide by 3 and not by 2
        mesh = AbstractMesh((1, model), ("data", "tensor"))
        rules = [*(rule for rule in models.RULES if "embed" not in rule[0]), ("", PartitionSpec())]
        found = jax.tree.map(lambda x: x.spec, sharding.shardings(state, mesh, rules))
        values, scales = found.opt_state.values[0].mu, found.opt_state.block_scales[0].mu
        assert values == found.params and values["layers"]["up"]["kernel"] == PartitionSpec(None, None, "tensor")
        assert scales["layers"]["up"] == {
            "kernel": PartitionSpec(None, None, "tensor") if model == 3 else PartitionSpec(None, None),
            "bias": None,
        }


def bigrams(params, batch, frozen, hyper):
    """Cross-entropy of the next token after one token: a language model of two matrices."""
    del frozen, hyper
    logits = jax.nn.log_softmax(params["embed"]["embedding"][batch[:, 0]] @ params["head"]["kernel"])
    nll = -jnp.take_along_axis(logits, batch[:, 1:], axis=-1)
    return {"nll": Term(1.0, Mean(jnp.sum(nll), jnp.asarray(float(len(batch)))))}, {}


@functools.cache
def trained(bits):
    """Losses of 100 updates of a language model of bigrams, and its last state."""
    rng = np.random.default_rng(0)
    params = {"embed": {"embedding": rng.normal(size=(64, 32))}, "head": {"kernel": rng.normal(size=(32, 64))}}
    params = jax.tree.map(lambda x: (0.1 * x).astype(np.float32), params)
    first = rng.zipf(1.3, 512) % 64  # some tokens are rare, and their second moments small
    batch = np.stack([first, (first * 5 + rng.integers(0, 3, 512)) % 64], axis=1).astype(np.int32)
    optimizer = optax.adamw(1e-2)
    if bits < 32:
        optimizer = precision.compressed(optimizer, bits=bits, block=32, smallest=64)
    update, traces = train.make_update(bigrams, optimizer), []

    def counted(state, batch):
        traces.append(1)
        return update(state, batch)

    state, losses = jax.jit(lambda params: train.TrainState.create(params, optimizer))(params), []
    step = jax.jit(counted, donate_argnums=0)
    for _ in range(100):
        before, (state, metrics) = state, step(state, batch)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1 and all(x.is_deleted() for x in jax.tree.leaves(before.opt_state))
    return np.array(losses), state


@pytest.mark.parametrize("bits, distance", [(16, 0.001), (8, 0.01)])
def test_training_comes_as_far_as_in_float32(bits, distance):
    """The loss falls by about 3 nats; on the way and at the end 16 bits are within 0.1 % of that, and 8 bits in 1 %."""
    full, _ = trained(32)
    losses, state = trained(bits)
    assert full[0] - full[-1] > 2.5
    assert np.abs(losses - full).max() < distance * (full[0] - full[-1]), np.abs(losses - full).max()
    kept = state.opt_state.values[0]
    assert {x.dtype for x in jax.tree.leaves((kept.mu, kept.nu))} == {jnp.dtype("bfloat16" if bits == 16 else "uint8")}
    assert state.opt_state.step == 100


def square(params, batch, frozen, hyper):
    del frozen, hyper
    return {"square": Term(1.0, Mean(jnp.sum((params["w"] * batch) ** 2), jnp.ones(())))}, {}


def test_pmap_rounds_as_jit_does_and_steps_left_out_leave_the_state_alone():
    optimizer = precision.compressed(optax.adamw(0.1), bits=8, smallest=1)
    update = jax.jit(train.make_update(square, optimizer))
    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    start = jax.jit(lambda params: train.TrainState.create(params, optimizer))(params)
    first, _ = update(start, np.ones((2, 3), np.float32))
    mapped = jax.pmap(train.make_update(square, optimizer, axis_name="device"), axis_name="device")
    other, _ = mapped(sharding.replicate(start), np.ones((1, 2, 3), np.float32))
    same = sharding.unreplicate(other)
    jax.tree.map(np.testing.assert_array_equal, (same.params, same.opt_state), (first.params, first.opt_state))
    after, metrics = update(first, np.full((2, 3), np.nan, np.float32))
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (first.params, first.opt_state))


def test_what_cannot_be_compressed_is_refused():
    with pytest.raises(ValueError, match="bits=4, block=128; expected 16 or 8 bits"):
        precision.compressed(optax.sgd(1.0), bits=4)
    with pytest.raises(ValueError, match=r"holds \['bfloat16'\]; expected float32"):
        jax.eval_shape(precision.compressed(optax.adam(1.0, mu_dtype=jnp.bfloat16)).init, PARAMS)


@pytest.mark.parametrize("bits", [16, 8])
def test_numbers_stay_as_they_are(bits):
    optimizer = precision.compressed(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), bits=bits, smallest=0)
    state = jax.jit(optimizer.init)({"x": np.ones((2, 3), np.float32)})
    assert state.values.hyperparams["learning_rate"] == np.float32(0.1)
