"""Every row of the table against transformers: packed rows, folders as the hub has them, configurations without one."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax.io import families, hf
from alignax.models import TransformerConfig, transformer

GOLDENS = pathlib.Path(__file__).parents[1] / "vectors" / "hf"
OLDER = ("llama2", "llama3", "llama3_untied", "llama_linear", "qwen2", "qwen2_untied", "qwen3", "qwen3_untied")
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir() and path.name not in OLDER)


@functools.cache
def golden(case):
    return hf.load(GOLDENS / case), dict(np.load(GOLDENS / case / "expected.npz"))


def without_source(config):
    return TransformerConfig(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(TransformerConfig)}
    )


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(left), jax.tree.leaves(right)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_every_architecture_has_a_golden():
    found = {json.loads((GOLDENS / case / "config.json").read_text())["architectures"][0] for case in CASES + [*OLDER]}
    assert found == {row.architecture for row in families.FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_row_with_a_shared_prompt_equals_rows_of_transformers(case):
    """Eight tokens of the first row and its continuation as parent and child, then the second row, then padding."""
    loaded, expected = golden(case)
    tokens = np.concatenate([expected["tokens"][0], expected["tokens"][1, :23], np.full(3, -1)])[None]
    segments = np.repeat([1, 2, 3, 0], [8, 32, 23, 3])[None]
    parents = np.repeat([0, 1, 0, 0], [8, 32, 23, 3])[None]

    @jax.jit
    def forward(params, tokens, segments, parents):
        return loaded.model.logits(params, loaded.model.hidden(params, tokens, segments, parents=parents).states)

    logits = np.asarray(forward(loaded.params, *map(jnp.asarray, (tokens, segments, parents))))[0]
    assert np.all(np.isfinite(logits))
    np.testing.assert_allclose(logits[:40], expected["logits"][0], rtol=0, atol=2e-4)
    np.testing.assert_allclose(logits[40:63], expected["logits"][1, :23], rtol=0, atol=2e-4)


@pytest.mark.parametrize("case", ["gemma2", "gpt_neox", "gpt2"])
def test_gradients_are_finite_and_reach_every_parameter(case):
    loaded, expected = golden(case)
    tokens = jnp.asarray(expected["tokens"])
    segments = jnp.asarray(np.arange(40) < expected["lengths"][:, None], jnp.int32)

    def loss(params):
        logp = jax.nn.log_softmax(loaded.model.logits(params, loaded.model.hidden(params, tokens, segments).states))
        return -jnp.sum(jnp.where(segments[:, 1:, None] != 0, logp[:, :-1] ** 2, 0.0))

    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(loaded.params)):
        assert np.all(np.isfinite(leaf)) and np.any(np.asarray(leaf) != 0), path


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_without_a_folder_is_saved_as_its_family(tmp_path, case):
    from transformers import AutoConfig

    loaded, _ = golden(case)
    config = without_source(loaded.model.config)
    hf.save(tmp_path / "out", transformer(config), loaded.params)
    again = hf.load(tmp_path / "out")
    assert without_source(again.model.config) == config
    assert again.config["architectures"] == loaded.config["architectures"]
    assert_same_bits(again.params, loaded.params)
    assert AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == config.num_layers


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Tensor names without "transformer.", masks saved as buffers, the tied head stored once more or not."""
    folder = tmp_path / "gpt2"
    shutil.copytree(GOLDENS / "gpt2", folder)
    values = load_file(folder / "model.safetensors")
    values = {name.removeprefix("transformer."): value for name, value in values.items()}
    values["h.0.attn.bias"], values["h.1.attn.masked_bias"] = np.ones((1, 1, 48, 48), np.float32), np.float32([-1e4])
    save_file(values, folder / "model.safetensors")
    assert_same_bits(hf.load(folder).params, hf.load(GOLDENS / "gpt2").params)
    values["lm_head.weight"] = values["wte.weight"].copy()
    save_file(values, folder / "model.safetensors")
    assert_same_bits(hf.load(folder).params, hf.load(GOLDENS / "gpt2").params)
    values["lm_head.weight"][0, 0] += 1
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        hf.load(folder)
    del values["lm_head.weight"], values["wpe.weight"]
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: transformer\.wpe\.weight$"):
        hf.load(folder)


def test_pythia_as_the_hub_has_it(tmp_path):
    folder = tmp_path / "pythia"
    shutil.copytree(GOLDENS / "gpt_neox", folder)
    values = load_file(folder / "model.safetensors")
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        values[f"gpt_neox.layers.1.attention.{name}"] = np.ones(4, np.float32)
    save_file(values, folder / "model.safetensors")
    assert_same_bits(hf.load(folder).params, hf.load(GOLDENS / "gpt_neox").params)


def test_a_fused_tensor_of_a_wrong_shape_is_named(tmp_path):
    folder = tmp_path / "phi3"
    shutil.copytree(GOLDENS / "phi3", folder)
    values = load_file(folder / "model.safetensors")
    values["model.layers.1.self_attn.qkv_proj.weight"] = np.ones((31, 16), np.float32)
    save_file(values, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.qkv_proj\.weight has shape \(31, 16\), expected \(32, 16\)"
    ):
        hf.load(folder)


# Below: against transformers itself, where torch is installed.


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_from_a_configuration_without_a_folder(tmp_path, case):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    loaded, expected = golden(case)
    hf.save(tmp_path / "out", transformer(without_source(loaded.model.config)), loaded.params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    tokens = torch.tensor(expected["tokens"][:1].astype(np.int64))
    with torch.no_grad():
        np.testing.assert_allclose(theirs.eval()(tokens).logits[0], expected["logits"][0], rtol=0, atol=1e-5)
