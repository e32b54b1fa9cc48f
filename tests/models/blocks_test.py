"""The norms against their formulas, and one block whose sublayers are traced through by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from alignax.models import TransformerConfig
from alignax.models.blocks import Block, norm
from alignax.models.linear import Linear

CONFIG = TransformerConfig(
    vocab_size=7,
    hidden_size=6,
    intermediate_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    norm_eps=0.1,
)
RNG = np.random.default_rng(0)
X, SCALE, BIAS = RNG.normal(2.0, 3.0, (2, 1, 6)), RNG.normal(size=6), RNG.normal(size=6)


def rms(x):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.1)


def layer_norm(x):
    centred = x - np.mean(x, axis=-1, keepdims=True)
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 0.1)


@pytest.mark.parametrize(
    "switches, expected",
    [
        ({}, rms(X) * SCALE),
        ({"centred_scales": True}, rms(X) * (1 + SCALE)),
        ({"layer_norm": True}, layer_norm(X) * SCALE + BIAS),
    ],
)
def test_norms(switches, expected):
    module = norm(dataclasses.replace(CONFIG, **switches))
    params = {"scale": jnp.asarray(SCALE, jnp.float32), "bias": jnp.asarray(BIAS, jnp.float32)}
    if "layer_norm" not in switches:
        del params["bias"]
    found = module.apply({"params": params}, jnp.asarray(X, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=3e-6)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_where_norms_stand_and_what_the_mlp_reads(pre, post, parallel):
    """One token attends to itself, so attention is v and o; every norm has a scale of its own."""
    module = Block(dataclasses.replace(CONFIG, pre_norm=pre, post_norm=post, parallel=parallel))
    rng, kernels = np.random.default_rng(1), {}
    for path, shape in {"q": (6, 2), "k": (6, 2), "v": (6, 2), "o": (2, 6), "gate": (6, 4), "up": (6, 4)}.items():
        kernels[path] = rng.normal(0, 0.5, shape)
    kernels["down"] = rng.normal(0, 0.5, (4, 6))
    names = ["attn_norm", "mlp_norm"] * pre + ["attn_post_norm", "mlp_post_norm"] * post
    scales = {name: rng.normal(1, 0.3, 6) for name in names}
    params = {name: {"scale": scale} for name, scale in scales.items()}
    params["attn"] = {name: {"kernel": kernels[name]} for name in "qkvo"}
    params["mlp"] = {name: {"kernel": kernels[name]} for name in ("gate", "up", "down")}

    def normed(name, x):
        return rms(x) * scales[name] if name in scales else x

    mixed = normed("attn_post_norm", normed("attn_norm", X) @ kernels["v"] @ kernels["o"])
    inner = normed("mlp_norm", X if parallel else X + mixed)
    changed = (silu(inner @ kernels["gate"]) * (inner @ kernels["up"])) @ kernels["down"]
    expected = X + mixed + normed("mlp_post_norm", changed)
    params = jax_tree_float32(params)
    found, (cache, aux) = module.apply(
        {"params": params}, jnp.asarray(X, jnp.float32), jnp.zeros((2, 1, 1)), jnp.ones((2, 1, 1), bool)
    )
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert cache is None and aux == {}


def jax_tree_float32(tree):
    if isinstance(tree, dict):
        return {name: jax_tree_float32(leaf) for name, leaf in tree.items()}
    return jnp.asarray(tree, jnp.float32)


def test_a_kernel_of_another_shape_is_refused_by_name():
    for name, wrong, message in (
        ("kernel", (6, 3), r"kernel: shape \(6, 3\); expected \(6, 4\)"),
        ("bias", (5,), "bias"),
    ):
        params = {"kernel": jnp.zeros((6, 4)), "bias": jnp.zeros(4)} | {name: jnp.zeros(wrong)}
        with pytest.raises(ValueError, match=message):
            Linear(CONFIG, 4, use_bias=True).apply({"params": params}, jnp.zeros((1, 6)))
