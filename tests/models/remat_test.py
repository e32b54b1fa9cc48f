"""Policies by name: gradients are those without, what is kept is what was asked for, unknown names are refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from alignax.models import TransformerConfig, remat, transformer

CONFIG = TransformerConfig(
    vocab_size=16,
    hidden_size=20,
    intermediate_size=28,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    initializer_range=0.4,
)
SIZES = {  # of one layer, for 2 rows of 5 tokens
    "block_input": [(5, 20)],
    "qkv": [(5, 4, 6), (5, 2, 6), (5, 2, 6)],
    "attended": [(5, 4, 6)],
    "attn_out": [(5, 20)],
    "mlp_inner": [(5, 28)],
    "mlp_out": [(5, 20)],
}


def loss(policy):
    model = transformer(dataclasses.replace(CONFIG, remat=policy))
    tokens = jnp.arange(10).reshape(2, 5)
    return lambda params: jnp.sum(jnp.sin(model.hidden(params, tokens, jnp.ones_like(tokens)).states))


@functools.cache
def gradient(policy):
    rng, shapes = np.random.default_rng(0), jax.eval_shape(transformer(CONFIG).init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.4, leaf.shape), jnp.float32), shapes)
    return params, jax.jit(jax.grad(loss(policy)))(params)


@pytest.mark.parametrize(
    "policy",
    [remat.keep("attended", "mlp_inner"), remat.offload("block_input", kept=("qkv",)), remat.nothing],
    ids=["keep", "offload", "nothing"],
)
def test_gradients_are_those_without(policy):
    expected, found = gradient(None)[1], gradient(policy)[1]
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * np.max(np.abs(want)))


@pytest.mark.parametrize("names", [(), ("qkv",), ("attended", "mlp_inner"), ("attn_out",), tuple(remat.NAMES)])
def test_what_is_kept_is_what_was_asked_for(names, capsys):
    """The scan stacks it along the layers, beside what each block takes in unless that is kept by its name."""
    print_saved_residuals(loss(remat.keep(*names)), jax.eval_shape(transformer(CONFIG).init, jax.random.key(0)))
    lines = capsys.readouterr().out.splitlines()
    found = sorted(line.split()[0] for line in lines if line.startswith("f32[3,2,") and "argument" not in line)
    kept = [shape for name in {"block_input", *names} - {"mlp_out"} for shape in SIZES[name]]
    assert found == sorted(f"f32[3,2,{','.join(map(str, shape))}]" for shape in kept)


@pytest.mark.parametrize("make", [remat.keep, remat.offload, lambda name: remat.named(jnp.ones(1), name)])
def test_unknown_names_are_refused(make):
    with pytest.raises(ValueError, match=r"\['scores'\]; expected some of \['attended', 'attn_out', 'block_input'"):
        make("scores")


def test_a_name_is_offloaded_or_kept():
    with pytest.raises(ValueError, match=r"offload: \['qkv'\] are offloaded and kept"):
        remat.offload("qkv", "attended", kept=("qkv",))


def test_equal_policies_make_equal_configurations():
    first, second = (dataclasses.replace(CONFIG, remat=remat.keep("qkv", "attended")) for _ in range(2))
    assert first == second and hash(first) == hash(second)
