"""Mixtures of experts in folders: transformers' auxiliary loss, the spellings of config.json, what is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignax import losses
from alignax.io import families, hf
from alignax.models import RULES
from alignax.sharding import shardings

GOLDENS = pathlib.Path(__file__).parents[1] / "vectors" / "hf"


def source(case):
    return json.loads((GOLDENS / case / "config.json").read_text())


def read(values):
    return families.read_config(values, {}, dtype=jnp.float32, compute_dtype=None, remat=None)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_load_balancing_equals_transformers(case):
    loaded, expected = hf.load(GOLDENS / case), np.load(GOLDENS / case / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])
    segments = jnp.asarray(np.arange(tokens.shape[1]) < expected["lengths"][:, None], jnp.int32)
    aux = jax.jit(lambda params: loaded.model.hidden(params, tokens, segments).aux)(loaded.params)
    np.testing.assert_allclose(losses.load_balancing(aux).value(), expected["load_balancing"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_divide_over_the_model_axis(case):
    shapes = jax.eval_shape(hf.load(GOLDENS / case).model.init, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "tensor"))
    experts = shardings(shapes, mesh, RULES)["layers"]["mlp"]["experts"]
    for name, axis in (("gate", 3), ("up", 3), ("down", 2)):
        spec = experts[name]["kernel"].spec
        assert [i for i, entry in enumerate(spec) if entry == "tensor"] == [axis]


def test_both_spellings_of_the_number_of_experts():
    given = source("qwen3_moe")
    old, new = read(given), read({**{k: v for k, v in given.items() if k != "num_experts"}, "num_local_experts": 6})
    assert old == new and old.num_experts == 6 and old.experts_per_token == 2 and old.intermediate_size == 8
    assert not old.normalise_experts and read(given | {"norm_topk_prob": True}).normalise_experts
    for config in (old, new):
        written = families.write_config(config, dtype=jnp.float32, ids={})
        assert written["num_experts"] == 6 and "num_local_experts" not in written
    with pytest.raises(ValueError, match="num_experts is 6 and num_local_experts is 5; keep one"):
        read(given | {"num_local_experts": 5})


@pytest.mark.parametrize("key, value", [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_layers_of_both_sorts_are_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} is .*; Qwen3MoeForCausalLM is supported with"):
        read(source("qwen3_moe") | {key: value})
