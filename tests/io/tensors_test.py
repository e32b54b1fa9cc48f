"""Folders whose tensors do not fit: each kind of damage is named, with the file or tensor it is in."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax.io import hf, tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "vectors" / "hf" / "qwen2"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, **changes):
    values = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in values.items() if v is not None}, folder / "model.safetensors")


def split_in_two(folder):
    values = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(values)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in parts.items():
        save_file({name: values[name] for name in part}, folder / file)
    write_index(folder, {name: file for file, part in parts.items() for name in part})
    return values


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def refuse(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        hf.load(folder)
    assert str(folder) in str(caught.value)


def test_missing_extra_and_wrong_tensors_are_all_named(folder):
    rewrite(
        folder,
        **{
            UP: None,
            "model.norm.weight": None,
            "model.layers.2.input_layernorm.weight": np.ones(32, np.float32),
            "model.layers.0.self_attn.k_proj.bias": np.ones(15, np.float32),
            "model.layers.0.mlp.gate_proj.weight": np.ones((32, 48), np.float32),
            "model.layers.0.self_attn.q_proj.bias": np.ones(32, np.int32),
        },
    )
    with pytest.raises(ValueError) as caught:
        hf.load(folder)
    text = str(caught.value)
    assert f"missing: model.norm.weight, {UP};" in text
    assert "not expected: model.layers.2.input_layernorm.weight;" in text
    assert "model.layers.0.mlp.gate_proj.weight has shape (32, 48), expected (48, 32)" in text
    assert "model.layers.0.self_attn.k_proj.bias has shape (15,), expected (16,)" in text
    assert "model.layers.0.self_attn.q_proj.bias has dtype I32, expected one of F64, F32, F16, BF16" in text


def test_long_lists_are_cut(folder):
    rewrite(folder, **{f"x.{n}": np.ones(1, np.float32) for n in range(11)})
    refuse(folder, r"not expected: x\.0, .* and 3 more")


def test_biases_that_the_architecture_lacks_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, r"not expected: model\.layers\.0\.self_attn\.k_proj\.bias")


def test_untied_model_without_a_head_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, r"missing: lm_head\.weight$")


def test_sharded_folder_loads(folder):
    values = split_in_two(folder)
    loaded = hf.load(folder)
    np.testing.assert_array_equal(loaded.params["layers"]["mlp"]["up"]["kernel"][1], values[UP].T)


def test_index_that_names_a_missing_file(folder):
    split_in_two(folder)
    (folder / "b.safetensors").unlink()
    refuse(folder, r"b\.safetensors: there is no such file, though model\.safetensors\.index\.json names it")


def test_index_that_places_a_tensor_in_the_wrong_file(folder):
    split_in_two(folder)
    write_index(folder, read_index(folder) | {UP: "a.safetensors"})
    refuse(folder, rf"places tensor '{UP}' in a\.safetensors, which does not have it")
    write_index(folder, read_index(folder) | {UP: "b.safetensors", "ghost": "a.safetensors"})
    refuse(folder, r"places tensor 'ghost' in a\.safetensors")


def test_tensor_that_the_index_does_not_name(folder):
    values = split_in_two(folder)
    save_file({UP: values[UP]}, folder / "c.safetensors")
    write_index(folder, read_index(folder))
    hf.load(folder)  # a file the index does not name is not opened
    write_index(folder, read_index(folder) | {"model.norm.weight": "c.safetensors"})
    refuse(folder, rf"tensor '{UP}' is both in b\.safetensors and in c\.safetensors")


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/model.safetensors", "pytorch_model.bin", 3])
def test_index_that_points_elsewhere(folder, file):
    split_in_two(folder)
    write_index(folder, read_index(folder) | {UP: file})
    refuse(folder, r"expected a \.safetensors file in the same folder")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_index_that_is_none(folder, content):
    split_in_two(folder)
    (folder / INDEX).write_text(content)
    refuse(folder, r"index\.json: (is not JSON|holds a list|has no weight_map)")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:keep])
    refuse(folder, r"model\.safetensors: is not a whole safetensors file")


def test_pickled_weights_are_refused_by_name_and_never_opened(folder):
    (folder / "model.safetensors").unlink()
    canary = folder / "ran"
    # What pickle.load would run: open(canary, "w").
    program = f"cbuiltins\nopen\n(V{canary}\nVw\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(program)
    refuse(folder, r"has neither model\.safetensors nor .*; pytorch_model\.bin is never opened")
    assert not canary.exists()


def test_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, r"has neither model\.safetensors nor model\.safetensors\.index\.json$")


def test_leaf_without_a_tensor_name():
    with pytest.raises(ValueError, match="parameter 'a/b' has no tensor name; named: \\['c'\\]"):
        tensors.plan({"a": {"b": np.ones(2)}}, {"c": "C"})


@pytest.mark.parametrize("transposed", [True, False])
def test_parts_of_a_fused_tensor_alternate_group_by_group(tmp_path, transposed):
    """Two layers, inputs of 3, four groups of a query, a key and a value of two channels each."""
    shape = (24, 3) if transposed else (3, 24)
    stored = [np.arange(72, dtype=np.float32).reshape(shape) + 100 * layer for layer in range(2)]
    save_file({f"{layer}.qkv": value for layer, value in enumerate(stored)}, tmp_path / "model.safetensors")
    places = {name: tensors.Place("{}.qkv", transposed=transposed, groups=4) for name in "qkv"}
    leaves = tensors.plan({name: np.zeros((2, 3, 8), np.float32) for name in "kqv"}, places)
    with tensors.open_folder(tmp_path) as found:
        tensors.check(tmp_path, leaves, found)
        arrays = [np.asarray(tensors.read(leaf, found, None)) for leaf in leaves]
    for leaf, array in zip(leaves, arrays):
        for layer, value in enumerate(stored):
            grouped = (value.T if transposed else value).reshape(3, 4, 3, 2)
            np.testing.assert_array_equal(array[layer].reshape(3, 4, 2), grouped[:, :, "qkv".index(leaf.path)])
    (tmp_path / "out").mkdir()
    tensors.write(tmp_path / "out", leaves, arrays, 10**9)
    again = load_file(tmp_path / "out/model.safetensors")
    assert all(np.array_equal(again[f"{layer}.qkv"], value) for layer, value in enumerate(stored)) and len(again) == 2
