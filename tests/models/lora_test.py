"""Adapters: layers against numpy, decoding against the merged model, gradients by the chain rule, what is refused."""

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
from problems import assert_same, on_one_device, problems, rows, scored, three_updates, tiny

from alignax import models, sampling, sharding, train
from alignax.algorithms import kto, preference, sft
from alignax.models import LoraConfig, linear, lora

DORA = dataclasses.replace(CONFIG, dora=True)
TOKENS, SEGMENTS = rows(4)["tokens"], rows(4)["segments"]
PROBLEM, RUN = lora_problem(), on_one_device()
init, combine, merge = (jax.jit(function, static_argnums=2) for function in (lora.init, lora.combine, lora.merge))


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.logits(params, model.hidden(params, jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)).states)


def close(found, wanted, atol=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=atol * max(1, np.max(np.abs(wanted))))


@pytest.mark.parametrize("dtype, remat", [(jnp.float32, None), (jnp.bfloat16, jax.checkpoint_policies.dots_saveable)])
def test_the_start_is_the_base_bit_by_bit(dtype, remat):
    """With dropout too, and through remat."""
    model = models.transformer(dataclasses.replace(tiny()[0].config, dtype=dtype, remat=remat))
    base, config = tiny()[1], dataclasses.replace(CONFIG, dropout=0.5)
    adapters = init(jax.random.key(1), base, config)
    combined = combine(base, adapters, config, jax.random.key(3))
    np.testing.assert_array_equal(logits(model, combined), logits(model, base))


def test_the_start_of_dora_is_the_base_up_to_rounding():
    model, base = tiny()
    adapters = init(jax.random.key(1), base, DORA)
    close(logits(model, combine(base, adapters, DORA)), logits(model, base), 2e-6)


def test_a_column_of_zeros_makes_no_nan_of_dora():
    config = LoraConfig(rank=2, dora=True)
    x, _, parts = one_layer(config)
    base = jax.tree.map(lambda leaf: np.where(np.arange(5) == 1, 0, leaf).astype(np.float32), parts["base"])
    adapters = init(jax.random.key(0), base, config)
    expected = x @ np.asarray(base["layers"]["attn"]["q"]["kernel"]) + np.asarray(base["layers"]["attn"]["q"]["bias"])
    found, gradient = with_gradient(x, base, adapters, config, np.ones((2, 3, 5), np.float32))
    close(found, expected, 2e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_the_start_is_that_of_peft():
    """a within +-1 / sqrt(in) and of its variance, 1 / (3 in); its values do not depend on the other targets."""
    base = {"layers": {"attn": {name: {"kernel": np.ones((3, 64, 8), np.float32)} for name in "qv"}}}
    found = init(jax.random.key(0), base, LoraConfig(rank=32))["layers"]["attn"]
    a = np.asarray(found["q"]["lora_a"])
    assert a.shape == (3, 64, 32) and np.max(np.abs(a)) <= 1 / 8
    np.testing.assert_allclose(a.var(), 1 / (3 * 64), rtol=0.05)
    assert np.all(found["v"]["lora_b"] == 0) and found["v"]["lora_b"].shape == (3, 32, 8)
    assert not np.array_equal(a, found["v"]["lora_a"]) and not np.array_equal(a[0], a[1])
    alone = init(jax.random.key(0), base, LoraConfig(rank=32, targets="/v/kernel"))["layers"]["attn"]
    assert list(alone) == ["v"]
    np.testing.assert_array_equal(alone["v"]["lora_a"], found["v"]["lora_a"])


def one_layer(config, seed=0):
    """A projection of 6 to 5 with a bias, its input, its leaves and the numbers that it should compute with."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 5), "bias": (5,), "lora_a": (6, 2), "lora_b": (2, 5), "lora_magnitude": (5,)}
    leaves = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(2, 3, 6)).astype(np.float32)
    parts = {"base": {"q": {name: leaves[name] for name in ("kernel", "bias")}}}
    parts["adapters"] = {"q": {name: leaves[name] for name in ("lora_a", "lora_b")}}
    if config.dora:
        parts["adapters"]["q"]["lora_magnitude"] = leaves["lora_magnitude"]
    wrapped = {name: {"layers": {"attn": part}} for name, part in parts.items()}
    return x, leaves, wrapped


@functools.partial(jax.jit, static_argnums=3)
def run_layer(x, base, adapters, config):
    combined = lora.combine(base, adapters, config)["layers"]["attn"]["q"]
    shape = dataclasses.replace(tiny()[0].config, hidden_size=6)
    return linear.Linear(shape, 5, True).apply({"params": combined}, x)


@functools.partial(jax.jit, static_argnums=3)
def with_gradient(x, base, adapters, config, cotangent):
    """The layer, and the gradient in the adapters of its product with a cotangent."""
    found, pull = jax.vjp(lambda adapters: run_layer(x, base, adapters, config), adapters)
    return found, pull(cotangent)[0]


@pytest.mark.parametrize(
    "switches, scale", [({}, 5 / 2), ({"rslora": True}, 5 / 2**0.5), ({"dora": True}, 5 / 2)], ids=str
)
def test_a_layer_equals_the_sum_of_kernels(switches, scale):
    config = LoraConfig(rank=2, alpha=5.0, **switches)
    x, leaves, parts = one_layer(config)
    kernel = np.array(leaves["kernel"], np.float64)
    for i in range(6):
        for j in range(5):
            kernel[i, j] += scale * sum(leaves["lora_a"][i, k] * leaves["lora_b"][k, j] for k in range(2))
    if config.dora:
        for j in range(5):
            kernel[:, j] *= leaves["lora_magnitude"][j] / np.sqrt(sum(kernel[i, j] ** 2 for i in range(6)))
    close(run_layer(x, parts["base"], parts["adapters"], config), x @ kernel + leaves["bias"], 2e-6)
    merged = merge(parts["base"], parts["adapters"], config)["layers"]["attn"]["q"]
    assert sorted(merged) == ["bias", "kernel"]
    close(merged["kernel"], kernel, 2e-6)


def test_the_norm_of_dora_is_a_constant():
    """The gradient of sum(g y) in b is scale (m / norm) a^T x^T g, with nothing through the norm."""
    config = LoraConfig(rank=2, alpha=2.0, dora=True)
    x, leaves, parts = one_layer(config)
    g = np.random.default_rng(5).normal(size=(2, 3, 5)).astype(np.float32)
    _, grad = with_gradient(x, parts["base"], parts["adapters"], config, g)
    factor = leaves["lora_magnitude"] / np.linalg.norm(leaves["kernel"] + leaves["lora_a"] @ leaves["lora_b"], axis=0)
    rows_of_x, rows_of_g = x.reshape(-1, 6), g.reshape(-1, 5) * factor[None]
    found = grad["layers"]["attn"]["q"]
    close(found["lora_b"], leaves["lora_a"].T @ rows_of_x.T @ rows_of_g, 2e-6)
    close(found["lora_a"], rows_of_x.T @ rows_of_g @ leaves["lora_b"].T, 2e-6)


@pytest.mark.parametrize("config", [CONFIG, DORA], ids=["lora", "dora"])
def test_merged_equals_unmerged(config):
    model, base = tiny()
    _, adapters = start(config)
    combined, merged = combine(base, adapters, config), merge(base, adapters, config)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    wanted = np.asarray(logits(model, combined))
    close(logits(model, merged), wanted)
    assert np.max(np.abs(wanted - logits(model, base))) > 0.1


def test_decoding_merges_once_and_finds_the_same_tokens():
    model, base = tiny()
    _, adapters = start()
    combined, merged = combine(base, adapters, CONFIG), merge(base, adapters, CONFIG)
    names = {path.rpartition("/")[2] for path, _ in lora._leaves(jax.eval_shape(model.unroll, combined)["layers"][0])}
    assert names == {"kernel", "scale"}
    prompts, lengths = jnp.asarray(TOKENS[:, :3]), jnp.full(4, 3, jnp.int32)

    @jax.jit
    def greedy(params):
        return sampling.generate(model, params, prompts, lengths, jax.random.key(0), max_new_tokens=6, temperature=0)

    found, wanted = greedy(combined), greedy(merged)
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    close(found.logp, wanted.logp)
    assert not np.array_equal(wanted.tokens, greedy(base).tokens)


def test_the_mean_of_adapters_is_the_mean_of_their_changes():
    changed = jax.jit(lambda tree: [jax.tree.map(lambda x, i=i: jnp.sin(x * (i + 2) + i), tree) for i in range(3)])
    trees = changed(start()[1])
    for config in (CONFIG, dataclasses.replace(CONFIG, rslora=True)):
        found, wider = lora.average(trees, config)
        assert wider.rank == 6 and np.isclose(wider.scale, config.scale)
        for name, layer in found["layers"]["attn"].items():
            ones = [tree["layers"]["attn"][name] for tree in trees]
            changes = [config.scale * np.asarray(one["lora_a"]) @ np.asarray(one["lora_b"]) for one in ones]
            mean = wider.scale * np.asarray(layer["lora_a"]) @ np.asarray(layer["lora_b"])
            close(mean, np.mean(changes, axis=0), 1e-6)
        lora.check(tiny()[1], found, wider)  # fits
    for some, config, match in ([], CONFIG, "0 trees"), (trees, DORA, "dora=True"):
        with pytest.raises(ValueError, match=match):
            lora.average(some, config)


def test_dropout_is_off_without_a_key_and_unbiased_with_one():
    """Adapters that copy their input: each entry is gone, or 1 / (1 - rate) times as large, independently."""
    config = LoraConfig(rank=6, alpha=6.0, dropout=0.25)
    base = {"layers": {"attn": {name: {"kernel": jnp.asarray(np.zeros((2, 6, 6), np.float32))} for name in "qk"}}}
    eye = jnp.asarray(np.broadcast_to(np.eye(6, dtype=np.float32), (2, 6, 6)))
    adapters = {"layers": {"attn": {name: {"lora_a": eye, "lora_b": eye} for name in "qk"}}}
    module = linear.Linear(dataclasses.replace(tiny()[0].config, hidden_size=6), 6)
    x = np.random.default_rng(0).normal(size=(40, 50, 6)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def both_layers(name, x, key):
        leaves = lora.combine(base, adapters, config, key)["layers"]["attn"][name]
        return [module.apply({"params": jax.tree.map(lambda leaf: leaf[layer], leaves)}, x) for layer in (0, 1)]

    def run(name, layer, key=None):
        return np.asarray(both_layers(name, x, key)[layer])

    np.testing.assert_array_equal(run("q", 0), x)
    found = run("q", 0, jax.random.key(1)) / x
    kept = found != 0
    np.testing.assert_allclose(found[kept], 1 / 0.75, rtol=1e-6)
    sigma = (0.75 * 0.25 / kept.size) ** 0.5
    assert abs(kept.mean() - 0.75) < 5 * sigma
    for other in (run("q", 1, jax.random.key(1)), run("k", 0, jax.random.key(1)), run("q", 0, jax.random.key(2))):
        assert abs(np.mean(kept & (other != 0)) - 0.75**2) < 5 * sigma
    np.testing.assert_array_equal(run("q", 0, jax.random.key(1)) / x, found)


@functools.cache
def updated():
    return three_updates(PROBLEM, run=RUN)


def test_an_update_follows_the_chain_rule():
    """dL/da = scale dL/dW b^T and dL/db = scale a^T dL/dW, dL/dW that of all parameters at the merged ones."""
    (model, adapters), base = start(), tiny()[1]
    loss_fn = preference.make_loss(model)

    def of_all(params, batch):
        (term,) = loss_fn(params, batch, {"reference": base}, PROBLEM.hyper)[0].values()
        return term.mean.value()

    whole = jax.jit(jax.grad(of_all))(merge(base, adapters, CONFIG), PROBLEM.batch)["layers"]
    found = updated().gradient["layers"]
    assert jax.tree.structure(found) == jax.tree.structure(adapters["layers"])
    for part in ("attn", "mlp"):
        for name, own in adapters["layers"][part].items():
            grad = CONFIG.scale * np.asarray(whole[part][name]["kernel"])
            a, b = np.asarray(own["lora_a"]), np.asarray(own["lora_b"])
            close(found[part][name]["lora_a"], grad @ b.swapaxes(1, 2))
            close(found[part][name]["lora_b"], a.swapaxes(1, 2) @ grad)


def test_microbatches_and_nothing_recompiles():
    """With a key for dropout, of which there is none."""
    expected = updated()
    assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(expected.gradient)) > 1e-3
    hyper = PROBLEM.hyper | {"beta": 0.2}
    assert three_updates(PROBLEM._replace(hyper=hyper), run=RUN).metrics["loss"] != expected.metrics["loss"]
    assert len(RUN.traces) == 1
    hyper = PROBLEM.hyper | {"dropout_key": jax.random.key(5)}
    assert_same(three_updates(PROBLEM._replace(hyper=hyper), microbatches=4), expected)


def products(jaxpr):
    """The shapes of all matrix products, those of loops and of functions within included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def of_an_update(problem):
    model, params = problem.start()
    optimizer = optax.sgd(0.1)
    update = train.make_update(problem.make_loss(model), optimizer)
    state = train.TrainState.create(params, optimizer)
    return set(products(jax.make_jaxpr(update)(state, problem.batch, problem.frozen, problem.hyper).jaxpr))


def test_no_gradient_of_the_base_is_computed():
    """That of an MLP's kernel would be a product of its shape."""
    kernels = {(16, 24), (24, 16)}
    assert not of_an_update(PROBLEM) & kernels
    assert of_an_update(problems()["dpo"]) >= kernels


def test_statistics_see_the_adapters():
    (model, adapters), problem, base = start(), problems()["kto"], tiny()[1]
    frozen = {"reference": problem.frozen["reference"]}
    plain = kto.make_statistics(model)
    found = jax.jit(lora.adapted(plain, CONFIG))(adapters, problem.batch, frozen | {"base": base}, {})
    wanted = jax.jit(plain)(merge(base, adapters, CONFIG), problem.batch, frozen, {})
    for name, value in wanted.items():
        close(found[name].value(), value.value())
        assert value.value() > 0


def test_masks_of_dropout_differ_by_key_and_by_rows():
    (model, adapters), batch = start(), problems()["sft"].batch
    loss_fn = jax.jit(lora.adapted(sft.make_loss(model), dataclasses.replace(CONFIG, dropout=0.3)))

    def loss(hyper):
        (term,) = loss_fn(adapters, batch, {"base": tiny()[1]}, hyper)[0].values()
        return float(term.mean.value())

    keyed = [loss({"dropout_key": jax.random.key(seed)}) for seed in (0, 1, 0)]
    assert keyed[0] == keyed[2] and len({loss({}), *keyed}) == 3
    config = dataclasses.replace(CONFIG, dropout=0.3)
    seen = lora.adapted(lambda params, *others: params["layers"]["attn"]["q"]["lora_key"], config)
    parts = [jax.tree.map(lambda x, part=part: x[part::2], batch) for part in (0, 1)]
    hyper = {"dropout_key": jax.random.key(0)}
    keys = [jax.random.key_data(seen(adapters, part, {"base": tiny()[1]}, hyper)) for part in (*parts, parts[0])]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 4  # two layers, two micro-batches


def test_what_else_becomes_of_a_loss_function():
    _, adapters = start()

    def whole_batch(params, batch, frozen, hyper):
        return sorted(frozen or {}), hyper

    whole_batch.whole_batch = True
    made = lora.adapted(whole_batch, CONFIG)
    assert made.whole_batch and made(adapters, None, {"base": tiny()[1]}, {}) == (["reference"], {})
    assert lora.adapted(whole_batch, CONFIG, reference=False)(adapters, None, {"base": tiny()[1]}, {}) == ([], {})
    for frozen, said in (None, "NoneType"), ({"reference": 1}, r"\['reference'\]"):
        with pytest.raises(ValueError, match=f"frozen is {said}; expected {{'base': params}}"):
            made(adapters, None, frozen, {})


def test_a_head_may_be_trained_in_full():
    model, base = scored()
    config = dataclasses.replace(CONFIG, targets="attn/(q|v)/kernel", full="score/kernel")
    adapters = lora.init(jax.random.key(0), base, config)
    assert set(adapters) == {"backbone", "score"} and set(adapters["backbone"]["layers"]["attn"]) == {"q", "v"}
    jax.jit(lambda tree: tree, donate_argnums=0)(lora.init(jax.random.key(0), base, config))  # the base outlives it
    adapters["score"]["kernel"] += 1
    for params in (lora.combine(base, adapters, config), lora.merge(base, adapters, config)):
        np.testing.assert_allclose(params["score"]["kernel"], base["score"]["kernel"] + 1)
        assert model.unroll(params)["backbone"]["layers"]
    found, _ = lora.average([adapters, jax.tree.map(lambda x: 3 * x, adapters)], config)
    np.testing.assert_allclose(found["score"]["kernel"], 2 * adapters["score"]["kernel"], rtol=1e-6)


def test_shapes_will_do_and_rules_split_what_they_split_of_the_kernel():
    model, base = tiny()
    shapes = jax.eval_shape(functools.partial(lora.init, config=DORA), jax.random.key(0), base)
    made = lora.init(jax.random.key(0), jax.eval_shape(model.init, jax.random.key(0)), CONFIG)
    assert made["layers"]["attn"]["q"]["lora_a"].shape == shapes["layers"]["attn"]["q"]["lora_a"].shape
    where = sharding.shardings(shapes, AbstractMesh((1, 2), ("data", "tensor")), models.RULES)["layers"]
    specs = {f"{part}/{leaf}": where["mlp"][part][leaf].spec for part in ("up", "down") for leaf in where["mlp"][part]}
    split = {name: [axis for axis, part in enumerate(spec) if part == "tensor"] for name, spec in specs.items()}
    wanted = {"up/lora_a": [], "up/lora_b": [2], "up/lora_magnitude": [1]}
    assert split == wanted | {"down/lora_a": [1], "down/lora_b": [], "down/lora_magnitude": []}


@pytest.mark.parametrize(
    "numbers, match",
    [({"rank": 0}, "rank=0"), ({"alpha": 0}, "alpha=0"), ({"dropout": 1}, "dropout=1")],
)
def test_numbers_out_of_range_are_refused(numbers, match):
    with pytest.raises(ValueError, match=match):
        LoraConfig(**numbers)


@pytest.mark.parametrize(
    "switches, match",
    [
        ({"targets": "wrong"}, r"targets 'wrong' match no parameter; expected some of \['layers/attn/k/kernel'"),
        ({"targets": "embed"}, r"match \['embed/embedding'\]; expected kernels of linear projections only"),
        ({"targets": "kernel"}, r"match \['head/kernel'\]; expected"),
        ({"targets": "attn"}, r"match \['layers/attn_norm/scale'\]; expected"),
        ({"full": "wrong"}, "full 'wrong' matches no parameter"),
        ({"full": "mlp"}, r"both match \['layers/mlp/down/kernel'"),
    ],
)
def test_targets_that_do_not_fit_are_refused(switches, match):
    with pytest.raises(ValueError, match=match):
        lora.init(jax.random.key(0), tiny()[1], dataclasses.replace(CONFIG, **switches))


def test_experts_are_refused():
    model = models.transformer(dataclasses.replace(tiny()[0].config, mixture=True, num_experts=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ValueError, match=r"match \['layers/mlp/experts/down/kernel', "):
        lora.init(jax.random.key(0), shapes, LoraConfig(targets="layers/(attn|mlp)/.*kernel"))
    assert set(lora.init(jax.random.key(0), shapes, CONFIG)["layers"]) == {"attn"}


@pytest.mark.parametrize(
    "switches, match",
    [
        ({"rank": 3}, r"'layers/attn/k/lora_a' of shape \(2, 16, 2\); the base expects \(2, 16, 3\)"),
        ({"dora": True}, r"has \['layers/attn/k/lora_magnitude'"),
        ({"targets": "q/kernel"}, r"has \['layers/attn/k/lora_a'"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(switches, match):
    _, adapters = start()
    with pytest.raises(ValueError, match=match):
        lora.combine(tiny()[1], adapters, dataclasses.replace(CONFIG, **switches))


def test_a_base_with_adapters_is_refused():
    _, adapters = start()
    with pytest.raises(ValueError, match="the base has adapters already"):
        lora.combine(lora.combine(tiny()[1], adapters, CONFIG), adapters, CONFIG)
