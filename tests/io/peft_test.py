"""Adapter folders: what PEFT wrote against what it computes, round trips, what is refused."""

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

from alignax import logprobs
from alignax.io import hf, peft
from alignax.models import LoraConfig, lora

VECTORS = pathlib.Path(__file__).parents[1] / "vectors"
GOLDENS = VECTORS / "peft"
BASES = json.loads((GOLDENS / "provenance.json").read_text())["bases"]
SAID = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "fan_in_fan_out")


@functools.cache
def base(name):
    loaded = hf.load(VECTORS / name)
    return loaded.model, loaded.params


def outputs(model, params, expected):
    tokens, lengths = (jnp.asarray(expected[name]) for name in ("tokens", "lengths"))
    segments = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)
    if model.values is not None:
        return logprobs.last_score(model, params, tokens, segments)
    logits = model.logits(params, model.hidden(params, tokens, segments).states)
    return jnp.where(segments[:, :, None] == 1, logits, 0.0)


@pytest.mark.parametrize("case", BASES)
def test_what_peft_wrote_computes_what_peft_does(case):
    model, params = base(BASES[case])
    adapters, config = peft.load(GOLDENS / case, model)
    expected = np.load(GOLDENS / case / "expected.npz")
    run = jax.jit(lambda params, config=config: outputs(model, params, expected))
    combined = run(lora.combine(params, adapters, config))
    np.testing.assert_allclose(combined, expected["outputs"], rtol=0, atol=2e-4)
    assert np.max(np.abs(run(params | {}) - expected["outputs"])) > 0.01


@pytest.mark.parametrize("case", BASES)
def test_it_is_written_as_peft_wrote_it(tmp_path, case):
    """The same tensors by the same names, bit by bit, and the same values of all keys that matter."""
    model, _ = base(BASES[case])
    adapters, config = peft.load(GOLDENS / case, model)
    peft.save(tmp_path / "out", model, adapters, config, base_name="a/b")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", GOLDENS / case))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    ours, theirs = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "out", GOLDENS / case)
    )
    assert {key: ours[key] for key in SAID} == {key: theirs[key] for key in SAID}
    ends = {
        module: [end for end in ours["target_modules"] if module.endswith(end)] for module in theirs["target_modules"]
    }
    assert {end for (end,) in ends.values()} == set(ours["target_modules"])  # PEFT may name every layer's own
    assert ours["base_model_name_or_path"] == "a/b"
    assert ours["modules_to_save"] == (["score"] if case == "llama_score" else None)


def test_what_is_saved_is_loaded(tmp_path):
    model, params = base("hf/llama2")
    config = LoraConfig(rank=4, alpha=6, dropout=0.25, dora=True)
    adapters = lora.init(jax.random.key(0), params, config)
    peft.save(tmp_path / "out", model, adapters, config)
    loaded, said = peft.load(tmp_path / "out", model)
    assert said == config
    jax.tree.map(np.testing.assert_array_equal, loaded, adapters)
    some = dataclasses.replace(config, targets="attn/(q|o)/kernel")
    peft.save(tmp_path / "some", model, lora.init(jax.random.key(0), params, some), some)
    assert peft.load(tmp_path / "some", model)[1].targets == "(^|/)(layers/attn/q|layers/attn/o)/kernel$"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"rank_pattern": {"q_proj": 4}}, r"rank_pattern is \{'q_proj': 4\}, which is not supported"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"bias": "all"}, "bias is 'all', which is not supported; expected 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow is 3"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]; expected None"),
        ({"r": 2}, r"lora_A.weight has shape \(3, 32\), expected \(2, 32\)"),
        ({"use_dora": True}, "do not fit adapter_config.json; missing: base_model.*lora_magnitude_vector"),
    ],
    ids=str,
)
def test_options_that_cannot_be_said_are_refused(folder, changes, match):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=match):
        peft.load(folder, base("hf/llama2")[0])


def test_tensors_that_do_not_fit_are_refused(folder):
    model, path = base("hf/llama2")[0], folder / "adapter_model.safetensors"
    values = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    save_file({key: value for key, value in values.items() if key != name}, path)
    with pytest.raises(ValueError, match=f"given: .*missing: {name}"):
        peft.load(folder, model)
    save_file(values | {"base_model.model.lm_head.lora_A.weight": values[name]}, path)
    with pytest.raises(ValueError, match=r"not expected: base_model\.model\.lm_head\.lora_A\.weight"):
        peft.load(folder, model)
    save_file({"wrong": values[name]}, path)
    with pytest.raises(ValueError, match=r"holds no adapters of the model's projections: \['wrong'\]"):
        peft.load(folder, model)
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no such file; adapter_model\.bin is never opened"):
        peft.load(folder, model)


@pytest.mark.parametrize(
    "case, tensor", [("phi3", "qkv_proj"), ("gpt2", "c_attn"), ("gpt_neox", "query_key_value")], ids=str
)
def test_fused_projections_are_refused_by_name(tmp_path, case, tensor):
    model, params = base(f"hf/{case}")
    config = LoraConfig(rank=1, targets="attn/v/kernel")
    with pytest.raises(ValueError, match=rf"'layers/attn/v/kernel'\] in one tensor, .*{tensor}\.weight, so that"):
        peft.save(tmp_path / "out", model, lora.init(jax.random.key(0), params, config), config)
    with pytest.raises(ValueError, match=rf"in one tensor, .*{tensor}\.weight, so that"):
        peft.check(model, config)
    assert not list(tmp_path.iterdir())
    config = LoraConfig(rank=1, targets="(attn/o|mlp/down)/kernel")
    peft.check(model, config)
    adapters = lora.init(jax.random.key(0), params, config)
    peft.save(tmp_path / "out", model, adapters, config)
    jax.tree.map(np.testing.assert_array_equal, peft.load(tmp_path / "out", model)[0], adapters)
    path = tmp_path / "out/adapter_model.safetensors"
    fused = next(name for name in load_file(hf_file(case)) if f".{tensor}.weight" in name).removesuffix("weight")
    save_file({f"base_model.model.{fused}lora_A.weight": np.ones((1, 16), np.float32)}, path)
    with pytest.raises(ValueError, match=f"in one tensor, .*{tensor}"):
        peft.load(tmp_path / "out", model)


def hf_file(case):
    return VECTORS / "hf" / case / "model.safetensors"


def test_what_has_no_form_is_refused(tmp_path, folder):
    model, params = base("hf/llama2")
    config = LoraConfig(rank=1, targets="q/kernel", full="final_norm")
    adapters = lora.init(jax.random.key(0), params, config)
    with pytest.raises(ValueError, match="parameter 'final_norm/scale'; expected adapters of"):
        peft.save(tmp_path / "out", model, adapters, config)
    with pytest.raises(ValueError, match="the base expects"):
        peft.save(tmp_path / "out", model, adapters, dataclasses.replace(config, rank=2))
    with pytest.raises(ValueError, match="given exists and is not an empty folder"):
        peft.save(folder, model, adapters, config)
    with pytest.raises(TypeError, match=r"model\.config is NoneType"):
        peft.load(folder, model._replace(config=None))
    assert not (tmp_path / "out").exists()


# Below: against PEFT itself, where it is installed.


@pytest.mark.parametrize("case", BASES)
def test_peft_opens_what_was_saved(tmp_path, case, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from vectors import make_peft_goldens

    model, params = base(BASES[case])
    _, config = peft.load(GOLDENS / case, model)
    config = dataclasses.replace(config, rank=5, alpha=7)
    adapters = lora.init(jax.random.key(0), params, config)
    adapters = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), adapters)
    peft.save(tmp_path / "out", model, adapters, config)
    monkeypatch.chdir(VECTORS.parents[1])
    theirs = make_peft_goldens.compute(tmp_path / "out", BASES[case])
    ours = outputs(model, lora.combine(params, adapters, config), theirs)
    np.testing.assert_allclose(ours, theirs["outputs"], rtol=0, atol=2e-4)
