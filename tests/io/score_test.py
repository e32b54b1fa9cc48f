"""Reward models and critics as sequence-classification folders: scores against transformers, round trips, refusals."""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignax import logprobs
from alignax.io import families, hf, score
from alignax.models import TransformerConfig, add_score, transformer, with_score

GOLDENS = pathlib.Path(__file__).parents[1] / "vectors" / "score"
CASES = sorted(path.name for path in GOLDENS.iterdir() if path.is_dir())
# one golden of the language model of every architecture
LANGUAGE_MODELS = {
    json.loads(path.read_text())["architectures"][0]: path.parent
    for path in sorted(GOLDENS.with_name("hf").glob("*/config.json"))
}
TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}


def last_scores(model, params, tokens, lengths):
    segments = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None], jnp.int32)
    return np.asarray(jax.jit(lambda p: logprobs.last_score(model, p, jnp.asarray(tokens), segments))(params))


def random_params(model):
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.3, leaf.shape).astype(np.float32)), shapes)


def edit_config(folder, **values):
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(GOLDENS / "llama", tmp_path / "given")
    return tmp_path / "given"


@pytest.mark.parametrize("case", CASES)
def test_scores_of_ragged_rows_equal_transformers(case):
    loaded, expected = hf.load(GOLDENS / case), np.load(GOLDENS / case / "expected.npz")
    assert loaded.model.values is not None and "head" not in loaded.params["backbone"]
    scores = last_scores(loaded.model, loaded.params, expected["tokens"], expected["lengths"])
    np.testing.assert_allclose(scores, expected["scores"], rtol=0, atol=2e-4)
    assert np.ptp(expected["scores"]) > 0.3  # transformers did tell the rows apart


@pytest.mark.parametrize("case", CASES)
def test_load_save_load_is_bit_equal(tmp_path, case):
    loaded = hf.load(GOLDENS / case)
    hf.save(tmp_path / "out", loaded.model, loaded.params)
    original, saved = (load_file(path / "model.safetensors") for path in (GOLDENS / case, tmp_path / "out"))
    assert saved.keys() == original.keys()
    assert all(saved[name].tobytes() == original[name].tobytes() for name in original)
    before, after = (json.loads((path / "config.json").read_text()) for path in (GOLDENS / case, tmp_path / "out"))
    assert after == before | {"num_labels": 1, "head_dim": 8}
    again = hf.load(tmp_path / "out")
    assert again.model.config == loaded.model.config
    assert jax.tree.structure(again.params) == jax.tree.structure(loaded.params)


@pytest.mark.parametrize("row", families.FAMILIES, ids=lambda row: row.model_type)
def test_every_family_has_its_classifier(row):
    written = score.with_score({"architectures": [row.architecture], "model_type": row.model_type}, None)
    assert score.is_scored(written) and not score.is_scored({"architectures": [row.architecture]})
    assert score.without_score(written)["architectures"] == [row.architecture]
    names = score.tensor_names(row.tensors)
    assert names.pop("score/kernel") == "score.weight"
    assert names == {f"backbone/{path}": row.tensors[path] for path in row.tensors if path != "head/kernel"}


def test_reward_model_made_from_a_policy_is_saved_as_a_classifier(tmp_path, tiny_folder):
    policy = hf.load(tiny_folder)
    params = add_score(policy.model, policy.params, jax.random.key(1))
    hf.save(tmp_path / "out", with_score(policy.model), params, policy.tokenizer)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1
    assert config["id2label"] == {"0": "LABEL_0"} and config["pad_token_id"] == policy.tokenizer.pad_token_id == 1
    loaded = hf.load(tmp_path / "out")
    assert loaded.eos_ids == policy.eos_ids
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_label_keeps_its_name_and_padding_its_id(tmp_path, folder):
    edit_config(folder, id2label={"0": "helpful"}, label2id={"helpful": 0}, pad_token_id=7)
    loaded = hf.load(folder)
    hf.save(tmp_path / "out", loaded.model, loaded.params)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["id2label"], config["label2id"], config["pad_token_id"]) == ({"0": "helpful"}, {"helpful": 0}, 7)


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {"0": "A", "1": "B"}},
        {"id2label": ...},
        {"id2label": ..., "num_labels": 3},
        {"num_labels": 2},
        {"id2label": 1},
    ],
)
def test_any_number_of_labels_but_one_is_refused(folder, labels):
    edit_config(folder, **labels)
    with pytest.raises(ValueError, match=r"given: config\.json: LlamaForSeq.* has num_labels .*; expected one label"):
        hf.load(folder)


def test_num_labels_alone_will_do(folder):
    edit_config(folder, id2label=..., label2id=..., num_labels=1)
    assert hf.load(folder).model.values is not None


def test_classifier_outside_the_table_is_refused(folder):
    edit_config(folder, architectures=["BertForSequenceClassification"], model_type="bert")
    with pytest.raises(
        ValueError, match=r"'BertForSeq.*' is not supported; supported: LlamaForSequenceClassific.*Qwen3"
    ):
        hf.load(folder)


@pytest.mark.parametrize("case", CASES)
def test_head_of_a_language_model_is_not_expected(tmp_path, case):
    shutil.copytree(GOLDENS / case, tmp_path / "model")
    values = load_file(tmp_path / "model/model.safetensors")
    save_file(
        values | {"lm_head.weight": values["model.embed_tokens.weight"].copy()}, tmp_path / "model/model.safetensors"
    )
    with pytest.raises(ValueError, match=r"not expected: lm_head\.weight"):
        hf.load(tmp_path / "model")


def test_missing_or_wide_score_is_named(folder):
    values = load_file(folder / "model.safetensors")
    save_file(values | {"score.weight": np.ones((2, 32), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"score\.weight has shape \(2, 32\), expected \(1, 32\)"):
        hf.load(folder)
    del values["score.weight"]
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: score\.weight"):
        hf.load(folder)


def test_policy_that_is_its_own_critic_is_refused(tmp_path):
    bare = transformer(TransformerConfig(**TINY))
    params = random_params(bare)
    model = with_score(bare)
    with pytest.raises(
        ValueError, match=r"still has the head of its language model.*save\(folder, MODEL_WITHOUT_SCORE"
    ):
        hf.save(tmp_path / "out", model, add_score(bare, params, keep_head=True))
    with pytest.raises(ValueError, match="only one of the two has"):
        hf.save(tmp_path / "out", model, params)
    assert not (tmp_path / "out").exists()
    hf.save(tmp_path / "policy", bare, add_score(bare, params, keep_head=True)["backbone"])
    hf.save(tmp_path / "critic", model, add_score(bare, params))
    assert "score.weight" in load_file(tmp_path / "critic/model.safetensors")


# Below: against transformers itself, where torch is installed.


def test_classifiers_have_the_names_of_transformers():
    pytest.importorskip("torch")
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    for row in families.FAMILIES:
        written = score.with_score({"architectures": [row.architecture]}, None)
        assert written["architectures"] == [NAMES[row.model_type]]


@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_transformers_scores_what_was_saved_alike(tmp_path, case):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    policy = hf.load(LANGUAGE_MODELS[case])
    model, params = with_score(policy.model), add_score(policy.model, policy.params, jax.random.key(0))
    hf.save(tmp_path / "out", model, params)
    edit_config(tmp_path / "out", pad_token_id=0)
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert other.config.num_labels == 1
    lengths = np.array([12, 7, 1])
    valid = np.arange(12) < lengths[:, None]
    tokens = np.where(valid, np.random.default_rng(5).integers(3, 32, valid.shape), 0)
    with torch.no_grad():
        theirs = other(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid.astype(np.int64))).logits[:, 0]
    np.testing.assert_allclose(last_scores(model, params, tokens, lengths), theirs.numpy(), rtol=0, atol=2e-4)
