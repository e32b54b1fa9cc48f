"""Quantised bases against the formulas in numpy; adapters on them; nothing of float size is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh
from lora_problem import CONFIG, lora_problem, start
from problems import problems, rows, tiny

from alignax import models, sampling, sharding, train
from alignax.algorithms import sft
from alignax.models import lora, quantised

pytest.importorskip("qwix")

# Appendix E of the QLoRA paper: the quantiles of a normal distribution that 4 bits stand for.
NF4 = (
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
)
KINDS = {"int8": quantised.int8, "nf4": functools.partial(quantised.nf4, block=8)}
TOKENS, SEGMENTS = (rows(4)[name] for name in ("tokens", "segments"))
combine, merge = (jax.jit(function, static_argnums=2) for function in (lora.combine, lora.merge))


def by_hand(kind, kernel, levels):
    """The floats that a kernel [in, out] becomes; of two levels that are as near, int8 may take either."""
    size = 8 if kind == "nf4" else kernel.shape[0]
    found = np.zeros_like(kernel)
    for j in range(kernel.shape[1]):
        for first in range(0, kernel.shape[0], size):
            weights, own = kernel[first : first + size, j], levels[first : first + size, j]
            if kind == "nf4":
                scale = np.max(np.abs(weights))
                nearest = [min(range(16), key=lambda level: abs(NF4[level] - w / scale)) for w in weights]
                assert list(own) == nearest
                found[first : first + size, j] = [scale * NF4[level] for level in nearest]
            else:
                scale = np.max(np.abs(weights)) / 127.5
                assert np.max(np.abs(weights / scale - own)) < 0.5001
                found[first : first + size, j] = scale * own
    return found


@functools.cache
def bases(kind):
    """The tiny model's parameters, quantised, and with the kernels that numpy says these stand for."""
    params = tiny()[1]
    made, wanted = jax.jit(KINDS[kind])(params), jax.tree.map(lambda x: x, params)
    for part in ("attn", "mlp"):
        for name, leaves in wanted["layers"][part].items():
            levels = np.asarray(made["layers"][part][name]["kernel"].qvalue).astype(np.int32)
            pairs = zip(np.asarray(leaves["kernel"]), levels)
            wanted["layers"][part][name] = {"kernel": jnp.asarray(np.stack([by_hand(kind, *pair) for pair in pairs]))}
    return made, wanted


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.logits(params, model.hidden(params, jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)).states)


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_and_logits_are_those_of_the_formula(kind):
    model, params = tiny()
    found, wanted = bases(kind)
    floats = merge(found, start()[1], dataclasses.replace(CONFIG, alpha=1e-30))  # adapters that weigh nothing
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6), floats, wanted)
    np.testing.assert_allclose(logits(model, found), logits(model, wanted), rtol=0, atol=2e-5)
    moved = np.max(np.abs(np.asarray(logits(model, found)) - np.asarray(logits(model, params))))
    assert 1e-3 < moved < (0.2 if kind == "int8" else 5)
    kernel = found["layers"]["mlp"]["up"]["kernel"]
    assert kernel.qvalue.dtype == (jnp.int8 if kind == "int8" else jnp.uint4)
    assert kernel.scale.shape == ((2, 1, 24) if kind == "int8" else (2, 2, 24))


@pytest.mark.parametrize("kind, dora", [("int8", True), ("nf4", False)])
def test_adapters_learn_what_they_learn_on_the_floats(kind, dora):
    config = dataclasses.replace(CONFIG, dora=dora)
    batch, (model, adapters) = problems()["sft"].batch, start(config)
    loss_fn = lora.adapted(sft.make_loss(model), config)

    def loss(adapters, base, batch):
        (term,) = loss_fn(adapters, batch, {"base": base}, {})[0].values()
        return term.mean.value()

    run = jax.jit(jax.value_and_grad(loss))
    found, wanted = (run(adapters, base, batch) for base in bases(kind))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    largest = max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(wanted[1]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * largest), found[1], wanted[1])


def kept(jaxpr):
    """The shapes of what loops stack."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            yield from (out.aval.shape for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from kept(inner)


def test_floats_of_all_layers_are_never_kept():
    problem, (model, adapters), optimizer = lora_problem(), start(), optax.sgd(0.1)
    update = train.make_update(problem.make_loss(model), optimizer)
    state, frozen = train.TrainState.create(adapters, optimizer), {"base": bases("nf4")[0]}
    jaxpr = jax.make_jaxpr(update)(state, problem.batch, frozen, problem.hyper).jaxpr
    shapes = set(kept(jaxpr))
    assert (2, 16, 2) in shapes and not {(2, 16, 24), (2, 24, 16), (2, 16, 16)} & shapes


def test_decoding_leaves_them_as_they_are():
    model, adapters = start()
    base, floats = bases("int8")
    prompts, lengths = jnp.asarray(TOKENS[:, :3]), jnp.full(4, 3, jnp.int32)

    @jax.jit
    def greedy(params):
        return sampling.generate(model, params, prompts, lengths, jax.random.key(0), max_new_tokens=5, temperature=0)

    combined = combine(base, adapters, CONFIG)
    assert "lora_a" in jax.eval_shape(model.unroll, combined)["layers"][0]["attn"]["q"]
    np.testing.assert_array_equal(greedy(combined).tokens, greedy(combine(floats, adapters, CONFIG)).tokens)


def test_rules_split_integers_and_scales():
    mesh = AbstractMesh((1, 2), ("data", "tensor"))
    where = sharding.shardings(bases("nf4")[0], mesh, models.RULES)["layers"]["mlp"]
    found = {name: (where[name]["kernel"].qvalue.spec, where[name]["kernel"].scale.spec) for name in ("up", "down")}
    column, row = jax.P(None, None, "tensor"), jax.P(None, "tensor", None)
    assert found == {"up": (column, column), "down": (row, jax.P())}


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda params: quantised.nf4(params), r"'layers/attn/k/kernel' of shape \(2, 16, 8\) .* blocks of 64 inputs"),
        (lambda params: quantised.int8(params, targets="wrong"), "'wrong' match no parameter"),
        (lambda params: quantised.int8(params, targets="kernel"), r"match \['head/kernel'\]"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(tiny()[1])
