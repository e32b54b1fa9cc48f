"""The mixture of experts against loops over tokens and experts, and how its work is cut into blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import drawn

from alignax.models import TransformerConfig, moe, transformer

SHAPE = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "num_heads": 2, "head_dim": 4}


def config_of(experts, chosen, **switches):
    return TransformerConfig(
        **SHAPE, num_kv_heads=1, mixture=True, num_experts=experts, experts_per_token=chosen, **switches
    )


def random_params(config, seed=0):
    rng, width, inner = np.random.default_rng(seed), config.hidden_size, config.intermediate_size
    normal = lambda *shape: rng.normal(0, 0.4, shape).astype(np.float32)  # noqa: E731
    experts = {name: {"kernel": normal(config.num_experts, width, inner)} for name in ("gate", "up")}
    experts["down"] = {"kernel": normal(config.num_experts, inner, width)}
    return {"router": {"kernel": normal(width, config.num_experts)}, "experts": experts}


def mixture(params, x, chosen, normalise):
    """The formula of arXiv:2401.04088, section 2.1, one token at a time. Returns outputs, softmax, choices."""
    kernels = {name: np.asarray(value["kernel"], np.float64) for name, value in params["experts"].items()}
    outputs, probs, choices = [], [], []
    for token in np.asarray(x, np.float64):
        logits = token @ np.asarray(params["router"]["kernel"], np.float64)
        p = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-p)[:chosen]
        weights = p[best] / p[best].sum() if normalise else p[best]
        gates = [token @ kernels["gate"][e] for e in best]
        inner = [g / (1 + np.exp(-g)) * (token @ kernels["up"][e]) for g, e in zip(gates, best)]
        outputs.append(sum(w * (h @ kernels["down"][e]) for w, h, e in zip(weights, inner, best)))
        probs.append(p)
        choices.append(best)
    return np.stack(outputs), np.stack(probs), np.stack(choices)


@pytest.mark.parametrize("rows, experts, chosen, normalise", [(1, 5, 2, True), (40, 5, 3, False), (150, 3, 1, True)])
def test_mixture_equals_the_loop_over_tokens_and_experts(rows, experts, chosen, normalise):
    config = config_of(experts, chosen, normalise_experts=normalise)
    params, rng = random_params(config), np.random.default_rng(1)
    x = rng.normal(size=(1, rows, 8)).astype(np.float32)
    counted = rng.random((1, rows)) < 0.7
    out, sums = jax.jit(moe.MixtureMLP(config).apply)({"params": params}, x, counted)
    expected, probs, choices = mixture(params, x[0], chosen, normalise)
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-5)
    load = np.bincount(choices[counted[0]].reshape(-1), minlength=experts)
    np.testing.assert_array_equal(sums["expert_tokens"], load)
    np.testing.assert_allclose(sums["expert_probs"], probs[counted[0]].sum(0), rtol=1e-5)
    z = np.log(np.exp(np.asarray(x[0], np.float64) @ params["router"]["kernel"]).sum(-1)) ** 2
    np.testing.assert_allclose(sums["router_z"], z[counted[0]].sum(), rtol=1e-5)


def test_gradient_is_that_of_the_sum_over_all_experts():
    config = config_of(4, 2)
    params, rng = random_params(config), np.random.default_rng(2)
    x, pull = (rng.normal(size=(1, 30, 8)).astype(np.float32) for _ in range(2))

    def dense(params, x):
        probs = jax.nn.softmax(x[0] @ params["router"]["kernel"])
        probs = jnp.where(probs >= jnp.sort(probs)[:, -2:-1], probs, 0.0)
        kernel = {name: value["kernel"] for name, value in params["experts"].items()}
        inner = jax.nn.silu(jnp.einsum("nd,edf->nef", x[0], kernel["gate"]))
        inner = inner * jnp.einsum("nd,edf->nef", x[0], kernel["up"])
        return jnp.einsum("nef,efd,ne->nd", inner, kernel["down"], probs / probs.sum(-1, keepdims=True))[None]

    def gradient(layer):
        return jax.jit(jax.grad(lambda params, x: jnp.sum(layer(params, x) * pull), argnums=(0, 1)))(params, x)

    found = gradient(lambda params, x: moe.MixtureMLP(config).apply({"params": params}, x)[0])
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(gradient(dense))):
        assert np.abs(wanted).max() > 0, path
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=str(path))


in_blocks = jax.jit(moe.in_blocks, static_argnums=1)


@pytest.mark.parametrize("crowd", [0.0, 0.9, 1.0])
def test_blocks_hold_every_assignment_once_and_one_expert_each(crowd):
    rng, experts = np.random.default_rng(3), 7
    chosen = np.stack([rng.permutation(experts)[:2] for _ in range(101)])
    chosen = np.where(rng.random((101, 1)) < crowd, [[4, 2]], chosen)
    blocks = in_blocks(chosen, experts)
    slots, tokens, of_block, used = (np.asarray(part) for part in blocks)
    size = len(tokens) // len(of_block)
    assert len(np.unique(slots)) == slots.size == 202 and slots.max() < used * size
    np.testing.assert_array_equal(tokens[slots], np.arange(101)[:, None] + np.zeros_like(chosen))
    np.testing.assert_array_equal(of_block[slots // size], chosen)
    assert (tokens == 101).sum() == len(tokens) - 202
    assert used == sum(-(-np.sum(chosen == e) // size) for e in range(experts)) <= len(of_block)


def test_work_grows_with_the_choices_and_not_with_the_experts():
    """Rows of the blocks in use: the choices, and some padding of every expert."""
    for tokens, experts, per_token in ((16, 8, 2), (2048, 8, 2), (2048, 128, 8)):
        rng = np.random.default_rng(4)
        chosen = np.stack([rng.permutation(experts)[:per_token] for _ in range(tokens)])
        blocks = in_blocks(chosen, experts)
        rows = int(blocks.used) * len(blocks.tokens) // len(blocks.experts)
        assert rows < 1.6 * chosen.size + 4 * experts, (tokens, experts, rows)


def test_blocks_that_are_not_in_use_are_not_multiplied():
    x, kernels = np.ones((5, 4, 3), np.float32), np.full((2, 3, 2), 2.0, np.float32)
    kernels[1] = np.nan

    @jax.jit
    def both(x, kernels, experts, used, cotangent):
        out, pull = jax.vjp(lambda x, kernels: moe.grouped_matmul(x, kernels, experts, used), x, kernels)
        return out, *pull(cotangent)

    out, x_grad, kernels_grad = map(
        np.asarray, both(x, kernels, np.array([0, 0, 1, 1, 1]), 2, np.ones((5, 4, 2), np.float32))
    )
    np.testing.assert_array_equal(out[:2], 6.0)
    np.testing.assert_array_equal(out[2:], 0.0)
    np.testing.assert_array_equal(x_grad, [[[4.0] * 3] * 4] * 2 + [[[0.0] * 3] * 4] * 3)
    np.testing.assert_array_equal(kernels_grad, [[[8.0] * 2] * 3, [[0.0] * 2] * 3])


def test_padding_changes_neither_real_tokens_nor_the_sums():
    model = transformer(config_of(5, 2, initializer_range=0.3))
    params, hidden = drawn(model, 0.3), jax.jit(model.hidden)
    tokens = np.random.default_rng(5).integers(0, 32, (2, 9))
    segments = (np.arange(9) < np.array([[4], [9]])).astype(np.int32)
    first = jax.device_get(hidden(params, tokens, segments))
    other = jax.device_get(hidden(params, np.where(segments, tokens, 7), segments))
    real = segments != 0
    np.testing.assert_allclose(np.asarray(first.states)[real], np.asarray(other.states)[real], rtol=0, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, first.aux, other.aux)
    alone = (hidden(params, tokens[[row, row]], segments[[row, row]]).aux for row in (0, 1))
    short, long = map(jax.device_get, alone)
    for name in first.aux:
        np.testing.assert_allclose(first.aux[name], (short[name] + long[name]) / 2, rtol=1e-5, err_msg=name)
    assert first.aux["router_rows"] == 2 * 13
    np.testing.assert_array_equal(first.aux["expert_tokens"].sum(-1), [2 * 13] * 2)


def test_a_cache_keeps_no_sums():
    model = transformer(config_of(5, 2))

    def decode():
        params, tokens = model.init(jax.random.key(0)), jnp.ones((1, 3), jnp.int32)
        prefill = model.hidden(params, tokens, tokens, cache=model.init_cache(1, 5))
        own = tokens[:, :1]
        return prefill.aux, model.hidden(params, own, own, positions=3 * own, cache=prefill.cache).aux

    assert jax.eval_shape(decode) == ({}, {})


def test_mixtures_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="experts_per_token=6 of num_experts=5"):
        config_of(5, 6)
    for switch in ({"mlp_bias": True}, {"gated_mlp": False}):
        with pytest.raises(ValueError, match="experts of a mixture are gated MLPs without a bias"):
            config_of(5, 2, **switch)
